"""What some extras of the installed package ask for: `python -m zoo.deployment.requirements EXTRA...`, one a line.

For machines without torch: `pip install --no-deps` of the wheel, then these. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import requires

from zoo.errors import ZooError, nearest, one_line

_EXTRA = re.compile(r"""^(?P<what>[^;]+?)\s*;\s*extra\s*==\s*['"](?P<extra>[^'"]+)['"]\s*$""")


def requirements_of(extras: Sequence[str], listed: Iterable[str] | None = None) -> list[str]:
    """Return the requirements of some extras, sorted, as the wheel lists them; those of the package itself left out.

    Raises ZooError for an extra that is not there.

    >>> requirements_of(["a"], ["numpy>=2", "zoo[b]; extra == 'a'", "pillow>=11; extra == 'a'", "x; extra == 'b'"])
    ['pillow>=11']
    """
    lines = (requires("zoo") or []) if listed is None else listed
    pairs = [found for each in lines if (found := _EXTRA.match(each))]
    known = {found["extra"] for found in pairs}
    for extra in extras:
        if extra not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise ZooError(f"there is no extra {one_line(extra)!r}{nearest(extra, known)}; the package has {allowed}")
    wanted = [each["what"] for each in pairs if each["extra"] in set(extras)]
    return sorted({each for each in wanted if not each.startswith("zoo[")})


if __name__ == "__main__":
    try:
        print("\n".join(requirements_of(sys.argv[1:])))
    except ZooError as error:
        sys.exit(f"error: {error}")
