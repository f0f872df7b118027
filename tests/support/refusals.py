"""What a refusal is known by: the type of the error, which has the exit code, and the place that it names."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lvctx.errors import LvctxError


@contextmanager
def refused(kind: type[LvctxError], where: str) -> Iterator[None]:
    """The body raises an error of this very type; `where` is the end of the place: a path, and a line or row of it."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind, caught.value
    assert f"/{caught.value.where}".endswith(f"/{where}"), caught.value
