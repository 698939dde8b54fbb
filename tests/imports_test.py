"""The import order of BUILD.md: a module imports rows above it, or its room."""

import ast
import pathlib

import toga_jax

ROOT = pathlib.Path(toga_jax.__file__).parent

# Row of each room or root module, as in BUILD.md.
ROWS = {
  'config': 0,
  'metrics': 0,
  'budget': 1,
  'sharding': 1,
  'data': 1,
  'quant': 1,
  'flags': 1,
  'spec': 2,
  'pallas': 2,
  'model': 3,
  'masks': 4,
  'surgery': 4,
  'ckpt': 5,
  'evals': 5,
  'workdir': 5,
  'api': 6,
  'cli': 6,
  'search': 7,
  'compress': 7,
  'evaluate': 7,
  'export': 7,
  'generate': 7,
  'bench': 7,
  'report': 7,
  'plan': 7,
  '__main__': 8,
}
NO_JAX = ('spec', 'budget', 'report')


def _room(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).with_suffix('').parts[0]


def _imports(path: pathlib.Path) -> set[str]:
  """Full dotted names a module imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      found |= {f'{node.module}.{a.name}' for a in node.names}
  return found


def _modules() -> list[pathlib.Path]:
  return [p for p in ROOT.rglob('*.py') if p != ROOT / '__init__.py']


def test_every_module_imports_only_rows_above_it_or_its_own_room():
  wrong = []
  for path in _modules():
    room = _room(path)
    for name in _imports(path):
      parts = name.split('.')
      if parts[0] != 'toga_jax':
        continue
      other = parts[1]
      if other != room and ROWS[other] >= ROWS[room]:
        wrong.append(f'{path.relative_to(ROOT)} imports {name}')
  assert wrong == []


def test_masks_and_surgery_do_not_know_each_other():
  for path in _modules():
    others = {'masks': 'surgery', 'surgery': 'masks'}.get(_room(path))
    names = [n for n in _imports(path) if n.startswith(f'toga_jax.{others}')]
    assert names == []


def test_spec_budget_and_report_import_no_jax():
  for name in NO_JAX:
    path = ROOT / f'{name}.py'
    if path.exists():
      roots = {n.split('.')[0] for n in _imports(path)}
      assert not roots & {'jax', 'flax', 'optax', 'orbax'}


def test_only_flags_reads_absl_flags():
  readers = [
    _room(p) for p in _modules() if any('absl' in n for n in _imports(p))
  ]
  assert readers == ['flags']


def test_every_module_has_a_row():
  assert {_room(p) for p in _modules()} <= set(ROWS)
