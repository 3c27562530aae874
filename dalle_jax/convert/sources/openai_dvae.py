"""The dVAE of OpenAI's DALL-E (Ramesh et al., 2021, section 2.1), an image tokenizer.

Files: encoder.pkl and decoder.pkl, which hold pickled modules; the sizes are attributes of the modules.
"""

from pathlib import Path
from typing import Any

from dalle_jax.convert import files, torch_file
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, conv, convert, named, row
from dalle_jax.models import dvae

EXPECTED = "a folder with encoder.pkl and decoder.pkl of OpenAI's DALL-E"


def table(side: str, blocks: int) -> list[Row]:
  """Rows of one of the two networks; the first block of a group may have a convolution in its shortcut."""
  names = {f'{side}_in': 'blocks.input', f'{side}_out': 'blocks.output.conv'}
  for g in range(dvae.GROUPS):
    for b in range(blocks):
      theirs = f'blocks.group_{g + 1}.block_{b + 1}'
      names |= {f'{side}_{g}_{b}/conv_{i}': f'{theirs}.res_path.conv_{i}' for i in range(1, 5)}
      names[f'{side}_{g}_{b}/id_path'] = f'{theirs}.id_path'
  rows = []
  for ours, name in names.items():
    rows += [row(f'{ours}/kernel', f'{name}.w', conv), row(f'{ours}/bias', f'{name}.b')]
  return rows


def read(path: Path) -> Imported:
  """Reads both networks. Raises ValueError or OSError with a one-line message."""
  folder = Path(path).expanduser()
  folder = folder.parent if folder.is_file() else folder
  theirs, sizes = {}, {}
  for side in ('encoder', 'decoder'):
    file = files.find(folder, f'{side}.pkl', f'{side}*.pkl', expected=EXPECTED)
    whole = torch_file.load(file)
    if not isinstance(whole, torch_file.Stub):
      raise ValueError(f'{file} holds {type(whole).__name__}; expected a pickled dVAE module.')
    theirs[side] = torch_file.module(whole)
    wanted = ('n_hid', 'n_blk_per_group', 'vocab_size', *(('n_init',) if side == 'decoder' else ()))
    sizes[side] = files.fields(file, whole.state, *wanted)
  if sizes['encoder']['vocab_size'] != sizes['decoder']['vocab_size']:
    raise ValueError(
      f'the encoder and the decoder in {folder} have different numbers of codes; expected a matching pair.'
    )
  model = dict(
    variant='openai',
    width=sizes['encoder']['n_hid'],
    blocks=sizes['encoder']['n_blk_per_group'],
    decoder_width=sizes['decoder']['n_hid'],
    decoder_blocks=sizes['decoder']['n_blk_per_group'],
    decoder_input=sizes['decoder']['n_init'],
    num_codes=sizes['encoder']['vocab_size'],
  )
  ours = ModuleSpec.of(dvae.build(**model), (1, 16, 16, 3))
  params: dict[str, Any] = {}
  for side in ('encoder', 'decoder'):
    shapes = {k: v for k, v in ours.shapes.items() if k.startswith(side)}
    rows = [
      r for r in table(side, sizes[side]['n_blk_per_group']) if r.ours in shapes or r.theirs[0][0] in theirs[side]
    ]
    params |= convert(str(folder / f'{side}.pkl'), rows, theirs[side], shapes)
  config = {'objective': 'dvae', 'model': model, 'data': {'image_size': 256}}
  return Imported(config, named('dvae', params), named('dvae', ours.axes))
