from __future__ import annotations

import pytest

from exitax.errors import UserError
from exitax.parallel import ProcessConfig
from exitax.parallel.distributed import slurm_place

PLACE = {'coordinator_address': 'a:8476', 'num_processes': 4, 'process_id': 3}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'process_id': None}, '--coordinator_address and --num_processes without --process_id: give'),
    (
      {'coordinator_address': None, 'num_processes': None},
      '--process_id without --coordinator_address and --num_processes: give all three, or none',
    ),
    ({'process_id': 4}, '--process_id=4 is outside 0 to num_processes-1=3'),
    ({'process_id': -1}, '--process_id=-1 is outside'),
    ({'num_processes': 0}, '--num_processes=0 must be at least 1'),
    ({'coordinator_address': 'a'}, '--coordinator_address=a is not HOST:PORT'),
    ({'roll_call_seconds': 0.0}, '--roll_call_seconds=0 must be above 0'),
    ({'heartbeat_seconds': 0}, '--heartbeat_timeout_seconds=0 must be at least 1'),
  ],
)
def test_places_that_cannot_be(changes, message):
  with pytest.raises(UserError) as error:
    ProcessConfig(**{**PLACE, **changes})
  assert str(error.value).startswith(message)


@pytest.mark.parametrize(
  ('nodes', 'first'),
  [
    ('node007', 'node007'),
    ('node007,other1', 'node007'),
    ('node[007-009,012],other1', 'node007'),
    ('gpu-a[3,5-9]', 'gpu-a3'),
    ('node[12]', 'node12'),
  ],
)
def test_slurm_names_the_first_node(nodes, first):
  environment = {
    'SLURM_JOB_ID': '70001',
    'SLURM_STEP_NODELIST': nodes,
    'SLURM_NTASKS': '16',
    'SLURM_PROCID': '5',
  }
  place = slurm_place(environment)
  assert place == {
    'coordinator_address': f'{first}:{61440 + 70001 % 4096}',
    'num_processes': 16,
    'process_id': 5,
  }
  assert ProcessConfig(**place).num_processes == 16


def test_elsewhere_slurm_says_nothing():
  assert slurm_place({'SLURM_JOB_ID': '1', 'PATH': '/bin'}) == {}
