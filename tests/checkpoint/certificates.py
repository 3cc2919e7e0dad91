"""A certificate to be changed by tests."""

from __future__ import annotations

import dataclasses

from exitax.checkpoint import Certificate


def make_certificate(**changes) -> Certificate:
  """Threshold 0.7 of the highest probability, for at most 64 greedy tokens."""
  made = Certificate(
    statement='threshold 0.7 on max_prob: expected ...',
    metric='token_agreement',
    risk=0.02,
    confidence=0.95,
    method='ltt',
    threshold=0.7,
    measure='max_prob',
    strategy='deferred',
    exit_layers=(2, 4),
    examples=500,
    population='1438 windows',
    examples_digest='abc',
    rows=({'threshold': 1.0, 'risk': 0.0}, {'threshold': 0.7, 'risk': 0.01}),
    settings={'max_new_tokens': 64, 'temperature': 0.0},
    checkpoint_step=20,
    checkpoint_digest='0' * 64,
    versions={'jax': '0.10'},
    created='2026-01-02T03:04:05+00:00',
  )
  return dataclasses.replace(made, **changes)
