"""Attention patterns: which keys each query sees in a stream of text and image tokens.

The stream is a text prefix, then the image tokens in raster order. For a prefix of 2 and 3 x 3 image tokens, with
queries down and keys across, the visible keys (x) of each kind of attention are

         full          row          column       conv (3 x 3)
  text   x........     x........     x........     x........
         xx.......     xx.......     xx.......     xx.......
  image  xxx......     xxx......     xxx......     xxx......
         xxxx.....     xxxx.....     xx.x.....     xxxx.....
         xxxxx....     xxxxx....     xx..x....     xx.xx....
         xxxxxx...     xxxxxx...     xxx..x...     xxxx.x...   and so on
and of the kinds of DALLE-pytorch, of which the text sees the same,

         own_row       causal_conv (3 x 3)
  image  xxx......     xxx......
         xxxx.....     xxxx.....
         xxxxx....     xxxxx....
         xx...x...     xxx..x...   and so on
"""

import dataclasses
import functools

import numpy as np

KINDS = ('full', 'row', 'column', 'conv', 'wrapped', 'own_row', 'causal_conv')


@dataclasses.dataclass(frozen=True)
class Pattern:
  """A kind of attention in a stream of `prefix` positions and a `grid` of image tokens (DALL-E, appendix B.1).

  Attention is causal and every query sees all text before it. Among the image tokens it sees itself and, with 'full',
  all earlier ones; with 'row', the w before it in raster order; with 'column', those above it; with 'conv', the earlier
  ones in the conv_kernel x conv_kernel window around it. Public models differ: with 'wrapped' (ru-DALLE), that window
  wraps around the edges of the image; with 'own_row' (DALLE-pytorch), only earlier tokens of its row are seen; with
  'causal_conv' (DALLE-pytorch), those in the window of which the token is the lower right corner.
  """

  kind: str
  prefix: int
  grid: tuple[int, int]
  conv_kernel: int = 11

  def __post_init__(self):
    if self.kind in ('conv', 'wrapped') and not self.conv_kernel % 2:
      raise ValueError(f'conv_kernel {self.conv_kernel} is even, and a window around a token is not; use an odd one.')

  def mask(self, n: int) -> np.ndarray:
    """Mask of the first n positions, bool[n, n], read-only; positions after the image see everything before them."""
    return _mask(self, n)

  def visible(self) -> np.ndarray:
    """Indices of the image tokens that each image token sees, int32[h * w, max visible], padded with -1."""
    return _visible(self)


@functools.lru_cache(maxsize=64)
def _mask(pattern: Pattern, n: int) -> np.ndarray:
  h, w = pattern.grid
  stream = np.arange(n)
  q, k = stream[:, None] - pattern.prefix, stream[None, :] - pattern.prefix  # image indices; negative in the text
  rows, columns = q // w - k // w, q % w - k % w
  reach = pattern.conv_kernel // 2
  match pattern.kind:
    case 'full':
      seen = np.ones((n, n), bool)
    case 'row':
      seen = q - k <= w
    case 'own_row':
      seen = rows == 0
    case 'column':
      seen = columns == 0
    case 'conv':
      seen = (np.abs(rows) <= reach) & (np.abs(columns) <= reach)
    case 'causal_conv':
      seen = (rows < pattern.conv_kernel) & (columns >= 0) & (columns < pattern.conv_kernel)
    case 'wrapped':
      near = lambda distance, size: np.minimum(distance % size, -distance % size) <= reach
      seen = near(rows, h) & near(columns, w)
    case _:
      raise ValueError(f'attention kind {pattern.kind!r} is unknown; there are {", ".join(KINDS)}.')
  mask = (k <= q) & (seen | (k < 0) | (q < 0) | (q >= h * w))
  mask.setflags(write=False)
  return mask


@functools.lru_cache(maxsize=32)
def _visible(pattern: Pattern) -> np.ndarray:
  n = pattern.grid[0] * pattern.grid[1]
  mask = _mask(dataclasses.replace(pattern, prefix=0), n)
  table = np.full((n, mask.sum(1).max()), -1, np.int32)
  for q, row in enumerate(mask):
    keys = np.flatnonzero(row)
    table[q, : len(keys)] = keys
  return table


def layer_kinds(pattern: str, depth: int) -> tuple[str, ...]:
  """The attention kind of every layer, e.g. 'row,column,row,row' repeated; 'paper' is DALL-E's (section 2.2).

  There layer i, from 1, is column when (i - 2) mod 4 = 0, else row, and the last one is conv. Raises ValueError for an
  unknown kind.
  """
  cycle = ('row', 'column', 'row', 'row') if pattern == 'paper' else tuple(p.strip() for p in pattern.split(','))
  if unknown := sorted(set(cycle) - set(KINDS)):
    raise ValueError(f'attention {pattern!r} has {", ".join(unknown)}; kinds are {", ".join(KINDS)}, or "paper".')
  kinds = tuple(cycle[i % len(cycle)] for i in range(depth))
  return (*kinds[:-1], 'conv') if pattern == 'paper' else kinds
