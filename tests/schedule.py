"""How tests are spread over workers: all tests of a family go to one of them, which builds and traces its model once."""

from xdist.scheduler import LoadScopeScheduling

from tests.models import FAMILIES

VARIANTS = ("_two", "_left", "_cut", "_tiles")  # of a family, in tests/vlm


def unit(nodeid: str) -> str:
    """The family that a test is about, else its file."""
    path, _, rest = nodeid.partition("::")
    _, _, parameters = rest.removesuffix("]").partition("[")
    for word in parameters.split("-"):
        names = [word, *(word.removesuffix(end) for end in VARIANTS)]
        for name in (f"{library}{name}" for name in names for library in ("", "hf/")):
            if name in FAMILIES:
                return name
    return path


class ByFamily(LoadScopeScheduling):
    """The units with most tests first, so that the last ones are short."""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
