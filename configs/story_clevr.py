"""CLEVR-SV, 72 real stories: VQGAN, DALL-E on single frames, then StoryDALL-E, on two CPU cores.

  python train.py --config configs/story_clevr.py --config.data.path=CLEVR_SV --config.root=runs/clevr
  python evaluate.py --run runs/clevr/story --path CLEVR_SV
`:vqgan`, `:dalle` and `:story` run one stage, `:prompt` the last one with prompt tuning; steps=0.1 trains for a tenth
of the steps. CLEVR_SV has images/ and CLEVR_dict.npy.

Each frame shows one object more than the last, and its caption describes only that one: the others the model knows from
the source and the other captions. Images are cropped randomly each time, tokens are noisy and steps are few: otherwise,
with 66 stories for training, the tokens of held-out stories soon become less probable than by chance.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, stage='', steps=1.0)
  c = common.base()
  c.stages, c.root = ('vqgan', 'dalle', 'story'), 'runs/clevr'
  c.data.update(source='clevr_sv', image_size=64, batch_size=16, source_args=dict(val_stories=6))
  c.tokenizer.update(vocab_size=512, length=16)

  def steps(count: int, every: int = 500):
    c.train.update(steps=max(1, int(count * arg.steps)), log_every=50, checkpoint_every=every, eval_every=every)

  def vqgan(c):
    c.objective = 'vqgan'
    c.model = dict(variant='small', attn_resolutions=(), num_codes=512)  # 8 x 8 codes
    c.loss = dict(l2_weight=1.0, disc_weight=0.0, beta=0.1, ema_decay=0.97)
    c.data.augment, c.data.source_args.unit, c.tokenizer.vocab_size = 'random_crop', 'frame', 0
    c.optim.update(lr=1e-3, warmup=100)
    steps(1_000)

  def dalle(c):
    c.objective = 'dalle'
    c.model = dict(variant='mini')
    c.frozen = dict(vqgan=c.get_ref('root') + '/vqgan')
    c.data.source_args.unit, c.data.augment = 'frame', 'random_crop'
    c.loss = dict(token_noise=0.3, noise_spread=0.3)
    c.optim.update(lr=1e-3, b2=0.96, weight_decay=0.045, warmup=50)
    steps(300, every=150)

  def story(c, prompt: bool = False):
    c.objective = 'story_dalle'
    c.model = dict(variant='mini', frames=3)
    c.frozen = dict(vqgan=c.get_ref('root') + '/vqgan')
    c.init.update(path=c.get_ref('root') + '/dalle', new='story/.*')
    c.data.batch_size, c.data.augment = 8, 'random_crop'
    c.loss = dict(text_weight=0.125, image_weight=0.875, token_noise=0.3, noise_spread=0.3)
    c.optim.update(lr=1e-3, b2=0.99, weight_decay=0.045, warmup=50)
    steps(300, every=150)
    if prompt:
      common.prompt_tuning(c)

  if arg.stage:
    common.choose_stage(c, arg.stage, dict(vqgan=vqgan, dalle=dalle, story=story, prompt=lambda c: story(c, True)))
  return c
