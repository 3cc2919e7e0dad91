"""Calibration: the lowest exit threshold whose loss is bounded, with a guarantee."""

from exitax.evaluate.calibration.calibrate import calibrate
from exitax.evaluate.calibration.config import CalibrateConfig, Draw, Forcing, Method
from exitax.evaluate.calibration.examples import Examples, file_examples, held_out_examples
from exitax.evaluate.calibration.losses import Metric
from exitax.evaluate.calibration.rendering import render_calibration, verdict
from exitax.evaluate.calibration.report import (
  CalibrationReport,
  make_certificate,
  write_calibration,
)
from exitax.evaluate.calibration.risk import (
  RiskDecision,
  RiskRow,
  conformal_risk_control,
  hoeffding_bentkus,
  learn_then_test,
  upper_bound,
)

__all__ = [
  # The one call.
  'CalibrateConfig',
  'Draw',
  'Forcing',
  'Method',
  'Metric',
  'calibrate',
  # Examples.
  'Examples',
  'file_examples',
  'held_out_examples',
  # Reports.
  'CalibrationReport',
  'make_certificate',
  'render_calibration',
  'verdict',
  'write_calibration',
  # Statistics.
  'RiskDecision',
  'RiskRow',
  'conformal_risk_control',
  'hoeffding_bentkus',
  'learn_then_test',
  'upper_bound',
]
