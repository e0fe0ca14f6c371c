"""What the notebooks' first cell runs: it puts the course in place and installs what it needs.

The cell executes this file out of the course's folder or, where there is none, of an archive of it.
"""

import sys
import tempfile
from pathlib import Path


def unpack(archive, course):
    """Unpack the only folder of `archive` to the folder `course`: the whole of it or nothing.

    Raises RuntimeError with one sentence that says what to do.
    """
    remedy = "make room for 20 MB, or work in a folder that you may write to,"
    try:
        with tempfile.TemporaryDirectory(dir=course.parent) as folder:
            archive.extractall(folder)
            remedy = f"give your own {course} another name"
            next(Path(folder).iterdir()).rename(course)
    except Exception as error:
        raise RuntimeError(f"Could not unpack the course: {remedy} and run this cell again "
                           f"({error}).") from None


def launch(found, place):
    """Make the course ready to import; returns its folder.

    `found` is that folder, or one in an archive that was just fetched (a `zipfile.Path`), which is
    then unpacked to the folder `place`.
    """
    if isinstance(found, Path):
        place = found
    else:
        unpack(found.root, place)
    sys.path.insert(0, str(place))
    from course_utils.install import install_missing

    install_missing()
    return place
