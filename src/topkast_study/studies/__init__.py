"""The studies: one file for each."""

from topkast_study import StudyError
from topkast_study.studies import (
    age,
    blocks,
    bwd,
    figure2,
    figure3,
    mixed,
    penalty,
    table1,
    table5,
    table6,
    units,
)
from topkast_study.study import Study

_ALL = (
    table1.STUDY,
    table5.STUDY,
    table6.STUDY,
    figure2.STUDY,
    figure3.STUDY,
    bwd.STUDY,
    penalty.STUDY,
    mixed.STUDY,
    age.STUDY,
    blocks.STUDY,
    units.IMAGES,
    units.TEXT,
)
STUDIES = {study.name: study for study in _ALL}


def find_study(name: str) -> Study:
    """Find a study by its name."""
    if name not in STUDIES:
        raise StudyError(f"there is no study {name!r}: choose one of {', '.join(STUDIES)}")
    return STUDIES[name]
