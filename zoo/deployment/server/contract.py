"""What the server's answers look like: the records behind its JSON and its OpenAPI schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Error(BaseModel):
    """Why there is no answer, in one line; nothing of what was sent stands in it."""

    error: str


class Row(BaseModel):
    """What the model says of one image, in the order in which the images came; `error` where it is none."""

    index: int
    label: str | None
    scores: dict[str, float] = Field(description="Calibrated, per class, in [0, 1].")
    prediction_set: list[str] = Field(description="The classes that the conformal rule cannot exclude.")
    refer: bool = Field(description="Whether a human should decide.")
    refer_reason: str | None
    operating_points: dict[str, bool] | None = Field(description="Whether each of them calls the image positive.")
    activation_map: list[list[float]] | None = Field(
        description="Where the network looked for its label, rows of [0, 1] over `activation_box`; with explain=true."
    )
    activation_box: list[float] | None = Field(
        description="What part of the upright image the map covers: left, top, right, bottom in [0, 1]."
    )
    error: str | None


class Answers(BaseModel):
    """The answer to `POST /predict`."""

    model: str
    predictions: list[Row]
    not_a_medical_device: bool


class Health(BaseModel):
    """The process lives."""

    status: str


class Models(BaseModel):
    """Names for `?model=`; the first is taken where none is named."""

    models: list[str]


class ModelFacts(BaseModel):
    """What is served under a name."""

    name: str
    classes: list[str]
    medical: bool
    image_size: int
    explains: bool
    format: str
    precision: str
    model: str
    dataset: str
    rules: dict[str, Any]
    card: str = Field(description="Markdown.")
    val: dict[str, Any]
    val_of: str = Field(description="Whose scores `val` are, in words.")
    test: dict[str, Any] | None
    test_of: str | None = Field(description="Whose scores `test` are, in words; null where there are none.")
