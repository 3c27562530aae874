"""The models of the benchmarks in plain PyTorch, written like the public code of this family. Needs torch; CPU only.

Eager by default. Attention is a linear layer each for queries, keys and values, then scores, a mask and softmax. Sparse
kinds are computed over rows, columns and windows of the image, as in DALLE-pytorch; with them, sampling runs the whole
sequence again for every token. With full attention there are two kinds of cache: 'layers' appends to the keys and
values of each layer, and 'steps', as in minDALL-E and the StoryDALL-E release, keeps a list of the keys and values of
each step, which every step concatenates again before the layers.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dalle_jax.layers.patterns import layer_kinds
from dalle_jax.models.dalle import DALLE


class Attention(nn.Module):
  def __init__(self, d: int, heads: int, kind: str, prefix: int, grid: tuple[int, int]):
    super().__init__()
    self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
    self.heads, self.kind, self.prefix, self.grid = heads, kind, prefix, grid

  def forward(self, x, past=None):
    b, n, d = x.shape
    q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
    if past is not None:
      k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True)) if past else (k, v)
    if self.kind == 'full':
      y = attend(q, k, v, causal(n, k.shape[2], x.device))
    else:
      y = self.sparse(q, k, v)
    return self.out(y.transpose(1, 2).reshape(b, n, d)), (k, v)

  def sparse(self, q, k, v):
    p, (h, w), n = self.prefix, self.grid, q.shape[2]
    pad = lambda x: F.pad(x, (0, 0, 0, p + h * w - n))
    text = attend(q[:, :, :p], k[:, :, :p], v[:, :, :p], causal(p, p, q.device))
    image = [pad(x)[:, :, p:].unflatten(2, (h, w)) for x in (q, k, v)]  # (b, heads, h, w, d)
    words = [x[:, :, None, :p] for x in (k, v)]
    if self.kind == 'conv':
      reach, size = 5, 11
      window = lambda x: x.flatten(0, 1).permute(0, 3, 1, 2)  # (b heads, d, h, w)
      take = lambda x: F.unfold(window(x), size, padding=reach).unflatten(1, (x.shape[-1], size * size))
      keys, values = (take(x).permute(0, 3, 2, 1)[:, :, : size * reach + reach + 1] for x in image[1:])
      ones = F.unfold(torch.ones(1, 1, h, w), size, padding=reach)[0].T[:, : size * reach + reach + 1] > 0
      queries = image[0].flatten(2, 3).flatten(0, 1)  # (b heads, h w, d)
      scale = queries.shape[-1] ** -0.5
      near = torch.einsum('zid,zijd->zij', queries, keys) * scale
      far = torch.einsum('zid,zjd->zij', queries, words[0][:, :, 0].flatten(0, 1)) * scale
      weights = torch.cat([far, near.masked_fill(~ones, -1e9)], -1).softmax(-1)
      y = torch.einsum('zij,zjd->zid', weights[:, :, :p], words[1][:, :, 0].flatten(0, 1))
      y = (y + torch.einsum('zij,zijd->zid', weights[:, :, p:], values)).unflatten(0, q.shape[:2])
    else:
      if self.kind == 'column':
        image = [x.transpose(2, 3) for x in image]
      length = image[0].shape[3]
      keys, values = (
        torch.cat([t.expand(-1, -1, x.shape[2], -1, -1), x], 3) for t, x in zip(words, image[1:], strict=True)
      )
      mask = torch.cat([torch.ones(length, p, dtype=torch.bool), causal(length, length, q.device)], 1)
      y = attend(image[0], keys, values, mask)
      y = (y.transpose(2, 3) if self.kind == 'column' else y).flatten(2, 3)
    return torch.cat([text, y[:, :, : n - p]], 2)


def causal(n: int, keys: int, device) -> torch.Tensor:
  return torch.ones(n, keys, dtype=torch.bool, device=device).tril(keys - n)


def attend(q, k, v, mask):
  scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
  return scores.masked_fill(~mask, -1e9).softmax(-1) @ v


class Block(nn.Module):
  def __init__(self, d: int, heads: int, kind: str, prefix: int, grid: tuple[int, int], cross: bool):
    super().__init__()
    self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
    self.attention = Attention(d, heads, kind, prefix, grid)
    self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
    self.heads, self.cross = heads, nn.ModuleList(nn.Linear(d, d) for _ in range(4)) if cross else None
    self.norm_3 = nn.LayerNorm(d) if cross else None

  def forward(self, x, past=None, source=None):
    y, past = self.attention(self.norm_1(x), past)
    x = x + y
    if self.cross is not None:
      query, key, value, out = self.cross
      split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
      q, k, v = split(query(self.norm_3(x))), split(key(source)), split(value(source))
      every = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
      x = x + out(attend(q, k, v, every).transpose(1, 2).flatten(2))
    return x + self.mlp(self.norm_2(x)), past


class Transformer(nn.Module):
  """A transformer with the sizes of `model`; with `cross` every block has cross-attention to a source frame."""

  def __init__(self, model: DALLE, cross: bool = False):
    super().__init__()
    d, self.prefix, self.image_length = model.d_model, model.text_length, model.image_length
    self.text, self.image = nn.Embedding(model.text_vocab, d), nn.Embedding(model.image_vocab, d)
    self.positions = nn.Parameter(torch.zeros(self.prefix + self.image_length, d))
    kinds = layer_kinds(model.attention, model.depth)
    self.sparse = set(kinds) != {'full'}
    self.blocks = nn.ModuleList(Block(d, model.heads, kind, self.prefix, model.grid, cross) for kind in kinds)
    self.norm = nn.LayerNorm(d)
    self.text_head = nn.Linear(d, model.text_vocab, bias=False)
    self.image_head = nn.Linear(d, model.image_vocab, bias=False)

  def forward(self, text, image, source=None):
    x = torch.cat([self.text(text), self.image(image)], 1) + self.positions
    frame = None if source is None else self.image(source) + self.positions[self.prefix :]
    for block in self.blocks:
      x, _ = block(x[:, : self.prefix + self.image_length], source=frame)
    x = self.norm(x)
    return self.text_head(x[:, : self.prefix - 1]), self.image_head(x[:, self.prefix - 1 : -1])

  @torch.no_grad()
  def sample(self, text, count: int, source=None, keep: str = 'layers') -> float:
    """Samples `count` tokens after the first; returns the seconds per token. `keep` is 'layers' or 'steps'."""
    x = self.text(text) + self.positions[: self.prefix]
    frame = None if source is None else self.image(source) + self.positions[self.prefix :]
    past, steps, start, tokens = [()] * len(self.blocks), [], 0.0, text[:, :0]
    for i in range(count + 1):
      if i == 1:
        start = time.perf_counter()
      if self.sparse:
        stream = torch.cat([self.text(text), self.image(tokens)], 1) + self.positions[: self.prefix + i]
        for block in self.blocks:
          stream, _ = block(stream)
        last = stream
      else:
        last = x
        if keep == 'steps' and steps:
          past = [tuple(pair) for pair in torch.cat(steps, -2)]
        for j, block in enumerate(self.blocks):
          last, past[j] = block(last, past[j], frame)
        if keep == 'steps':
          steps.append(torch.stack([torch.stack(pair)[..., -last.shape[1] :, :] for pair in past]))
      token = torch.multinomial(self.image_head(self.norm(last[:, -1])).softmax(-1), 1)
      tokens = torch.cat([tokens, token], 1)
      x = self.image(token) + self.positions[self.prefix + i]
    return (time.perf_counter() - start) / count


def inputs(model: DALLE, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
  """Random tokens of text, image and source."""
  draw = lambda vocab, n: torch.randint(0, vocab, (batch, n))
  n = model.image_length
  return draw(model.text_vocab, model.text_length), draw(model.image_vocab, n), draw(model.image_vocab, n)


def step_seconds(model: DALLE, batch: int, compiled: bool = False, cross: bool = False, repeats: int = 3) -> float:
  """Seconds of one update with AdamW: the fastest of `repeats`, after one to warm up."""
  net = Transformer(model, cross)
  optimizer, run = torch.optim.AdamW(net.parameters(), 1e-3), torch.compile(net) if compiled else net
  text, image, source = inputs(model, batch)

  def step():
    optimizer.zero_grad(set_to_none=True)
    by_text, by_image = run(text, image, source if cross else None)
    loss = F.cross_entropy(by_text.flatten(0, 1), text[:, 1:].flatten()) / 8
    loss = loss + F.cross_entropy(by_image.flatten(0, 1), image.flatten()) * 7 / 8
    loss.backward()
    optimizer.step()

  return fastest(step, repeats)


def token_seconds(model: DALLE, batch: int, count: int, cross: bool = False) -> dict[str, float]:
  """Seconds per token for `batch` images at once, as the mean of the first `count` tokens, by kind of cache."""
  text, _, source = inputs(model, batch)
  net, seconds = Transformer(model, cross).eval(), {}
  for keep in ('layers',) if net.sparse else ('layers', 'steps'):
    net.sample(text, 2, source if cross else None, keep)
    seconds[keep] = net.sample(text, count, source if cross else None, keep)
  return seconds


def fastest(call: Callable[[], object], repeats: int) -> float:
  """Seconds of the fastest of `repeats` calls, after one to warm up."""
  call()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return min(times)


def matmul(n: int = 2048) -> float:
  """FLOP/s of the product of `benchmarks.limits.matmul` in PyTorch."""
  a, b = torch.randn(2, n, n)
  return 2 * n**3 / fastest(lambda: a @ b, 10)


# --- VQGAN


def norm(channels: int) -> nn.Module:
  return nn.GroupNorm(32, channels, eps=1e-6)


class Res(nn.Module):
  def __init__(self, i: int, o: int):
    super().__init__()
    self.body = nn.Sequential(
      norm(i), nn.SiLU(), nn.Conv2d(i, o, 3, padding=1), norm(o), nn.SiLU(), nn.Conv2d(o, o, 3, padding=1)
    )
    self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

  def forward(self, x):
    return self.short(x) + self.body(x)


class Attn(nn.Module):
  def __init__(self, c: int):
    super().__init__()
    self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

  def forward(self, x):
    q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
    y = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
  def __init__(self, c: int):
    super().__init__()
    self.conv = nn.Conv2d(c, c, 3, 2)

  def forward(self, x):
    return self.conv(F.pad(x, (0, 1, 0, 1)))


class VQGAN(nn.Module):
  """The VQGAN of taming-transformers with the sizes of our `model`."""

  def __init__(self, model):
    super().__init__()
    ch, mult, blocks = model.ch, model.ch_mult, model.num_res_blocks
    levels = [model.image_size // 2**i in model.attn_resolutions for i in range(len(mult))]
    down, c = [nn.Conv2d(3, ch, 3, padding=1)], ch
    for i, m in enumerate(mult):
      for _ in range(blocks):
        down += [Res(c, ch * m)] + [Attn(ch * m)] * levels[i]
        c = ch * m
      down += [Down(c)] if i + 1 < len(mult) else []
    middle = lambda: [Res(c, c), Attn(c), Res(c, c)]
    down += [*middle(), norm(c), nn.SiLU(), nn.Conv2d(c, model.z_channels, 3, padding=1)]
    self.encoder = nn.Sequential(*down, nn.Conv2d(model.z_channels, model.code_dim, 1))
    self.codes = nn.Parameter(torch.randn(model.num_codes, model.code_dim))
    up = [nn.Conv2d(model.code_dim, model.z_channels, 1), nn.Conv2d(model.z_channels, c, 3, padding=1), *middle()]
    for i, m in reversed(list(enumerate(mult))):
      for _ in range(blocks + 1):
        up += [Res(c, ch * m)] + [Attn(ch * m)] * levels[i]
        c = ch * m
      up += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)] if i else []
    self.decoder = nn.Sequential(*up, norm(c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

  def encode(self, x):
    z = self.encoder(x).permute(0, 2, 3, 1)
    return (self.codes.square().sum(-1) - 2 * z @ self.codes.T).argmin(-1), z

  def decode(self, codes):
    return self.decoder(self.codes[codes].permute(0, 3, 1, 2))

  def forward(self, x):
    codes, z = self.encode(x)
    vectors = self.codes[codes]
    commit = (vectors.detach() - z).square().mean() + (vectors - z.detach()).square().mean()
    return self.decoder((z + (vectors - z).detach()).permute(0, 3, 1, 2)), commit


def vqgan_seconds(model, size: int, batch: int, names: tuple[str, ...]) -> dict[str, float]:
  """Seconds of 'encode', 'decode' and 'train' (an update by Adam on the L1 error) of `batch` images of size x size."""
  net, x = VQGAN(model), torch.rand(batch, 3, size, size) * 2 - 1
  optimizer = torch.optim.Adam(net.parameters(), 1e-4)
  codes = torch.randint(0, model.num_codes, (batch, *model.grid(size)))

  def step():
    optimizer.zero_grad(set_to_none=True)
    recon, commit = net(x)
    ((recon - x).abs().mean() + commit).backward()
    optimizer.step()

  calls = {'encode': torch.no_grad()(lambda: net.encode(x)), 'decode': torch.no_grad()(lambda: net.decode(codes))}
  return {name: fastest({**calls, 'train': step}[name], 2) for name in names}
