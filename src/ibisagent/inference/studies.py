"""Whole folders of studies: the series that a stated choice names, each segmented once, and a list of all of them.

`series.csv` in the folder of the results says of every series what became of it, and of each that was passed over why.
It names the places of the series below the studies' folder, which may name patients; the results themselves do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ibisagent.errors import ConfigError, IbisError
from ibisagent.files import csv_text, write_whole
from ibisagent.inference.batch import Batch, Failed, KeptVolume, PassedOver, Result, VolumeResult
from ibisagent.volumes import dicomweb
from ibisagent.volumes.series import Selection, Series, list_series

LIST = "series.csv"
_COLUMNS = (
    *("place", "series_number", "description", "modality", "plane", "slices", "series_uid"),
    *("outcome", "why", "record"),
)


def segment_studies(batch: Batch, places: Sequence[str], selections: Sequence[Selection]) -> Iterator[Result]:
    """The results of the series below folders, or in studies of DICOMweb servers, that any of `selections` chooses.

    One volume is in memory at a time. A series that fails does not stop the others; one whose result is there already
    is kept, so a stopped run resumes. Writes LIST after each. Raises ConfigError without a selection, DataError for a
    place without series.
    """
    if not selections:
        raise ConfigError("no series is chosen: say which, such as 'CT axial >= 20 slices', or all")
    rows: list[Sequence[object]] = []
    for place in places:
        for series in list_series(place):
            result = _segment_one(batch, series, selections)
            rows.append(_row(series, result))
            write_whole(csv_text([_COLUMNS, *rows]).encode(), batch.folder / LIST)
            yield result


def _segment_one(batch: Batch, series: Series, selections: Sequence[Selection]) -> Result:
    name = f"{series.place} (series {series.series_number or series.number})"
    reasons = [selection.why_not(series) for selection in selections]
    if all(reasons):
        return PassedOver(name, reasons[0])
    batch.listener.started(name)
    try:
        if dicomweb.is_url(series.place):
            return batch.segment(series.place)
        return batch.segment_volume(name, None, [str(file) for file in series.files])
    except IbisError as error:
        return Failed(name, error)


def _row(series: Series, result: Result) -> Sequence[object]:
    outcome, why, record = "segmented", "", ""
    if isinstance(result, Failed):
        outcome, why = "failed", str(result.error)
    elif isinstance(result, PassedOver):
        outcome, why = "passed over", result.why
    elif isinstance(result, KeptVolume):
        outcome, record = "segmented before", result.record.name
    elif isinstance(result, VolumeResult):
        record, why = result.outputs.record.name, "; ".join(result.outputs.failed)
    known = (series.series_number, series.description, series.modality, series.plane, series.slices, series.uid)
    return (series.place, *known, outcome, why, record)
