"""The page in headless Chromium: tokens stream in, in the colours of their exits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exitax.serve import Service

CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')

pytestmark = [
  pytest.mark.processes,
  pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason='chromium or chromedriver is not installed (Debian: chromium and chromium-driver)',
  ),
]


@pytest.fixture(scope='module')
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  profile: Path = tmp_path_factory.mktemp('chromium')
  for flag in (
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-dev-shm-usage',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--window-size=1000,900',
    f'--user-data-dir={profile}',
  ):
    options.add_argument(flag)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  service = webdriver.ChromeService(executable_path=DRIVER)
  driver = webdriver.Chrome(options=options, service=service)
  yield driver
  driver.quit()


def until(browser, condition: Callable[[], object]) -> None:
  from selenium.webdriver.support.ui import WebDriverWait

  WebDriverWait(browser, 20).until(lambda _: condition())


def element(browser, name: str):
  return browser.find_element('id', name)


def choose(browser, **values) -> None:
  """Sets controls as a user's hand would: by value and an event."""
  for name, value in values.items():
    browser.execute_script(
      'const e = document.getElementById(arguments[0]); e.value = arguments[1];'
      "e.dispatchEvent(new Event('input', {bubbles: true}));",
      name.replace('_', '-'),
      value,
    )


def layers_of(browser) -> list[int]:
  tokens = browser.find_elements('css selector', '#output .token')
  return [int(token.get_attribute('data-layer')) for token in tokens]


def generate(browser, **values) -> list[int]:
  choose(browser, **values)
  element(browser, 'go').click()
  until(browser, lambda: 'done' in element(browser, 'status').text)
  return layers_of(browser)


@pytest.fixture(scope='module')
def page(browser, served):
  browser.get(served.url)
  until(browser, lambda: '3 layers, exits at 1, 2' in element(browser, 'model').text)
  return browser


def test_tokens_are_coloured_by_depth_and_the_slider_moves_them(page):
  settings = {'prompt': 'ab', 'max_tokens': '24', 'temperature': '1', 'strategy': 'deferred'}
  assert set(generate(page, **settings, threshold='0')) == {1}
  assert set(generate(page, **settings, threshold='1')) == {3}
  mixed = generate(page, **settings, threshold='0.3')
  assert len(set(mixed)) > 1
  colours = {
    token.get_attribute('data-layer'): token.value_of_css_property('border-bottom-color')
    for token in page.find_elements('css selector', '#output .token')
  }
  assert len(set(colours.values())) == len(set(mixed))
  assert set(generate(page, **{**settings, 'strategy': 'full'})) == {3}
  assert not element(page, 'threshold').is_enabled()


def test_the_legend_counts(page):
  generate(page, strategy='deferred', threshold='0')
  legend = [item.text for item in page.find_elements('css selector', '#legend span')]
  assert [text.split('\n')[0] for text in legend] == ['layer 1', 'layer 2', 'all 3 layers']
  assert '100%' in legend[0]


@pytest.mark.parametrize('threshold', ['certified', [0.3, 0.2]])
def test_a_threshold_that_no_slider_shows_is_left_to_the_server(page, threshold):
  page.execute_script('model.threshold = arguments[0]; showStrategies()', threshold)
  asked = page.execute_script('return request()')
  assert not {'strategy', 'threshold'} & asked.keys()
  page.execute_script('model.threshold = null; showStrategies()')
  asked = page.execute_script('return request()')
  assert (asked['strategy'], 'threshold' in asked) == ('deferred', True)


def test_thinkers_have_a_column_each_and_the_answer_one_below(page):
  settings = {'prompt': 'ab', 'max_tokens': '6', 'strategy': 'speculative', 'answer_tokens': '4'}
  generate(page, **settings, thinkers='2')
  columns = page.find_elements('css selector', '#columns article')
  assert [c.find_element('css selector', 'h2').text for c in columns] == [
    'Thinker 1',
    'Thinker 2',
    'Answer',
  ]
  counts = [len(column.find_elements('css selector', '.token')) for column in columns]
  assert all(0 < count <= 6 for count in counts) and counts[2] <= 4
  boxes = [column.rect for column in columns]
  assert boxes[0]['y'] == boxes[1]['y'] < boxes[2]['y'] and boxes[0]['x'] < boxes[1]['x']
  assert page.execute_script('return request()')['strategy'] == 'full'
  choose(page, thinkers='1')
  assert not element(page, 'answer-tokens').is_enabled()
  generate(page)
  assert not page.find_elements('css selector', '#columns article')


def test_an_error_is_told_in_words(page):
  choose(page, max_tokens='100000')
  page.execute_script("document.getElementById('max-tokens').removeAttribute('max')")
  element(page, 'go').click()
  until(page, lambda: 'exceed the context of 256' in element(page, 'status').text)
  choose(page, max_tokens='24')


def test_stopping_frees_the_slot(page, served):
  choose(page, max_tokens='250', strategy='full')
  element(page, 'go').click()
  until(page, lambda: layers_of(page) or 'done' in element(page, 'status').text)
  if 'done' not in element(page, 'status').text:
    element(page, 'go').click()
  assert served.wait_idle()


def test_everything_comes_from_the_server_and_nothing_is_wrong(page, served):
  names = page.execute_script('return performance.getEntries().map(e => e.name)')
  foreign = [name for name in names if name.startswith('http') and served.url not in name]
  assert not foreign
  expected = '400 (Bad Request)'  # Of the request that was to be refused.
  logged = [entry['message'] for entry in page.get_log('browser')]
  assert [message for message in logged if expected not in message] == []


def test_a_key_is_asked_for(browser, make_service: Callable[..., Service], serving):
  with serving(make_service(), api_key='sesame') as served:
    browser.get(served.url)
    until(browser, lambda: 'API key' in element(browser, 'status').text)
    assert element(browser, 'key-box').get_attribute('open')
    choose(browser, key='sesame', max_tokens='5')
    element(browser, 'go').click()
    until(browser, lambda: 'done' in element(browser, 'status').text)
