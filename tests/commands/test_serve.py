"""`exitax serve`: what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from exitax.errors import UserError
from exitax.serve import bind


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--model_dir=nowhere'], 'nowhere'),
    (['--port=70000'], 'port=70000 is outside 0 to 65535'),
    (['--num_slots=0'], 'num_slots=0 must be at least 1'),
    (['--queue_timeout=0'], 'queue_timeout=0.0 must be above 0'),
    (['--capacity=100000'], 'capacity=100000 exceeds the context of the model, 64'),
    (['--threshold=2'], 'threshold=2.0 is outside [0, 1]'),
    (['--threshold=x'], '--threshold=x is not a number'),
    (['--strategy=fast'], "strategy='fast'"),
    (['--confidence=guess'], "confidence='guess' is not known"),
    (
      ['--confidence=classifier'],
      'confidence=classifier needs classifiers, one per exit: train them with',
    ),
    (['--weights=int2'], "weights='int2' is not known"),
    (['--max_logprobs=3000'], 'max_logprobs=3000 exceeds the vocabulary of 264'),
    (['--num_slots=1000000000'], 'are free: set --num_slots='),
    (['--drain_timeout=nan'], 'drain_timeout=nan must be at least 0'),
    (['--host='], 'host is empty'),
    (['--api_key='], '--api_key is empty'),
    (['--api_key=open sesame'], '--api_key: character 5 of 11 is a blank'),
    (['--chat_template=nowhere'], '--chat_template=nowhere cannot be read'),
    (['--host=192.0.2.1'], 'cannot listen on 192.0.2.1'),
    (['--gin.ServeConfig.num_slot=2'], 'num_slot'),
  ],
)
def test_bad_flags_are_one_line(exitax, trained: Path, flags: list[str], words: str):
  outcome = exitax('serve', f'--model_dir={trained}', '--port=0', *flags)
  assert outcome.status == 2
  assert words in outcome.err
  assert len(outcome.err.strip().splitlines()) == 1


def test_a_taken_port_is_told_before_anything_is_compiled(exitax, trained: Path):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    outcome = exitax('serve', f'--model_dir={trained}', f'--port={port}')
  assert outcome.status == 2
  assert f'cannot listen on 127.0.0.1 port {port}' in outcome.err


@pytest.mark.parametrize('key', ['', 'sésame'])
def test_a_key_of_the_environment_that_nobody_can_send(
  exitax, trained: Path, monkeypatch: pytest.MonkeyPatch, key: str
):
  monkeypatch.setenv('EXITAX_API_KEY', key)
  outcome = exitax('serve', f'--model_dir={trained}', '--port=0')
  assert outcome.status == 2
  assert outcome.err.startswith('exitax: EXITAX_API_KEY')


def test_of_two_servers_on_one_port_the_second_does_not_start():
  with bind('127.0.0.1', 0) as first:
    port = first.getsockname()[1]
    with pytest.raises(UserError, match=f'cannot listen on 127.0.0.1 port {port}'):
      bind('127.0.0.1', port)


@pytest.mark.parametrize('host', ['é' * 70, 'a\0b', 'nowhere.invalid'])
def test_names_of_no_machine(host: str):
  with pytest.raises(UserError, match=r'cannot listen on .* give --host=127.0.0.1') as refused:
    bind(host, 0)
  assert str(refused.value).isprintable()


def test_without_a_model(exitax):
  assert 'serve needs a model' in exitax('serve').err


def test_without_the_extra_it_says_what_to_install(
  exitax, trained: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setitem(sys.modules, 'fastapi', None)
  outcome = exitax('serve', f'--model_dir={trained}')
  assert outcome.status == 2
  assert "pip install 'exitax[serve]'" in outcome.err


@pytest.mark.processes
def test_told_to_stop_it_finishes_what_runs(trained: Path, subprocess_env: dict[str, str]):
  command = [sys.executable, '-m', 'exitax', 'serve', f'--model_dir={trained}', '--port=0']
  env = {**subprocess_env, 'EXITAX_API_KEY': 'sesame'}
  with subprocess.Popen(
    [*command, '--num_slots=2'], stdout=subprocess.PIPE, text=True, env=env
  ) as server:
    try:
      assert server.stdout is not None
      lines = iter(server.stdout.readline, '')
      address = next(line for line in lines if line.startswith('serving at ')).split()[2]
      request = urllib.request.Request(
        f'{address}/v1/completions',
        json.dumps({'prompt': 'w1', 'max_tokens': 50, 'ignore_eos': True, 'stream': True}).encode(),
        {'authorization': 'Bearer sesame'},
      )
      with urllib.request.urlopen(request, timeout=30) as answer:
        answer.readline()
        os.kill(server.pid, signal.SIGTERM)
        events = answer.read().decode().split('\n\n')
      assert events[-2] == 'data: [DONE]'
      assert '"finish_reason":"length"' in events[-3]
      assert server.wait(timeout=30) == 0
      assert list(lines) == ['stopped\n']
    finally:
      server.kill()
