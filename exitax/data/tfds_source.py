"""Documents from a TensorFlow Datasets directory in `array_record` form, without TensorFlow."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

from exitax.data.sources import Document
from exitax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A data set that `tfds` has already prepared with `file_format='array_record'`.

  Attributes:
    name: the data set, as `name`, `name/config` or `name/config:version`.
    data_dir: the folder that holds it; None is tfds's own default folder.
    split: a split, slices such as `train[:10%]` included.
    field: the feature that holds the text.
  """

  name: str
  data_dir: str | None = None
  split: str = 'train'
  field: str = 'text'

  def documents(self) -> Iterator[Document]:
    """One document an example, named `name/split:index`.

    Raises:
      UserError: tensorflow-datasets is missing, or the data set, split or field is not there.
    """
    records = self._open(_import_tfds())
    for index, record in enumerate(records):
      name = f'{self.name}/{self.split}:{index}'
      yield Document(name=name, text=self._text(record, name=name))

  def _open(self, tfds: Any) -> Any:
    where = f'{self.name!r} in {self.data_dir or "the default tfds folder"}'
    try:
      builder = tfds.builder(self.name, data_dir=self.data_dir)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError, AssertionError) as error:
      raise UserError(f'cannot open TFDS data set {where}: {first_line(error)}') from None
    if not builder.data_path.exists():
      raise UserError(
        f'TFDS data set {where} is not prepared: run '
        f"tfds.builder({self.name!r}, file_format='array_record').download_and_prepare() first"
      )
    try:
      return builder.as_data_source(split=self.split)
    except (NotImplementedError, ValueError, KeyError) as error:
      splits = ', '.join(builder.info.splits)
      raise UserError(
        f'cannot read split {self.split!r} of TFDS data set {where} (splits: {splits}; '
        f'array_record files are needed): {first_line(error)}'
      ) from None

  def _text(self, record: dict[str, Any], *, name: str) -> str:
    if self.field not in record:
      known = ', '.join(map(repr, record))
      raise UserError(f'{name}: no feature {self.field!r} (features: {known}); set field to one')
    value = record[self.field]
    if isinstance(value, str):
      return value
    if not isinstance(value, bytes):
      raise UserError(f'{name}: feature {self.field!r} is {type(value).__name__}, need text')
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise UserError(f'{name}: {self.field!r} is not UTF-8 text (byte {error.start})') from None


def first_line(error: BaseException) -> str:
  """The first line of an error's message, or its type where it has none."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _import_tfds() -> Any:
  try:
    return importlib.import_module('tensorflow_datasets')
  except ImportError as error:
    raise UserError(
      f'TfdsSource needs tensorflow-datasets ({error}): run pip install "exitax[tfds]"'
    ) from None
