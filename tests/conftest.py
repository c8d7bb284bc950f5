"""What holds for the tests of every room."""

import checked_calls

checked_calls.install()
