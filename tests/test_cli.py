"""The command line: exit codes, wording, instant help."""

import json
import subprocess
import sys

import pytest

from loralab.cli import app, main


def test_help_and_import_load_no_torch():
    probe = (
        "import sys, loralab, loralab.cli; loralab.cli.main(['--help']);"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("False\n")


@pytest.mark.parametrize("verb", app.commands)
def test_every_verb_has_an_example_and_json(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "loralab " + verb in text
    assert "--json" in text


def test_an_unknown_verb_gets_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(capsys):
    assert main(["train", "demo", "--lerning-rate", "1"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_errors_say_cause_and_next_step_and_no_traceback(capsys):
    assert main(["train", "dmo"]) == 2
    err = capsys.readouterr().err
    assert "error: no recipe 'dmo'" in err
    assert "next: " in err
    assert "Traceback" not in err


def test_errors_are_json_too(capsys):
    assert main(["train", "demo", "method.rnk=3", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["kind"] == "ConfigError"
    assert "did you mean 'rank'?" in document["error"]["cause"]


def test_init_writes_a_recipe_that_loads_and_refuses_to_overwrite(tmp_path, capsys):
    from loralab.config import load_config

    path = tmp_path / "my.toml"
    assert main(["init", str(path), "--model", "smollm2", "--data", "tweets"]) == 0
    config = load_config(path)
    assert (config.model.name, config.data.name) == ("smollm2", "tweets")
    assert main(["init", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
