"""A data set of one's own, for --dataset_class: the usual one with other captions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from library.data.sample.dataset import TrainingData, build_training_data


def build(*args: Any, **kwargs: Any) -> TrainingData:
    data = build_training_data(*args, **kwargs)
    records = [replace(record, caption=f"mine: {record.caption}") for record in data.records]
    return TrainingData(data.specs, records, data.scan, data.index, data.opts, data.seed)
