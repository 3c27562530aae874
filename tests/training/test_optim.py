import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dalle_jax.training import optim, sharding

PARAMS = {
  'net': {'dense': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}, 'norm': {'scale': jnp.ones(3)}},
  'critic': {'embed': {'embedding': jnp.ones((4, 2))}, 'kernel': jnp.ones(2)},
}


def config(**fields):
  c = common.base().optim
  c.update(fields)
  return c


def test_decay_takes_kernels_alone_and_is_scaled_by_the_rate():
  o = optim.build(config(lr=0.1, weight_decay=0.5, schedule='constant'), 10, list(PARAMS))
  updates, _ = o.tx.update(jax.tree.map(jnp.zeros_like, PARAMS), o.tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['net']['dense']['kernel'], -0.05 * np.ones((2, 3)), rtol=1e-6)
  np.testing.assert_allclose(updates['critic']['kernel'], -0.05 * np.ones(2), rtol=1e-6)
  for still in (
    updates['net']['dense']['bias'],
    updates['net']['norm']['scale'],
    updates['critic']['embed']['embedding'],
  ):
    assert not still.any()


def test_each_player_has_its_optimiser():
  groups = dict(critic=dict(name='sgd', b1=0.0, lr=2.0), net=dict(frozen=True))
  o = optim.build(config(schedule='constant', clip=1.0, groups=groups), 10, list(PARAMS))
  updates, _ = o.tx.update(
    {'critic': jax.tree.map(jnp.ones_like, PARAMS['critic'])}, o.init(PARAMS), {'critic': PARAMS['critic']}
  )
  assert set(updates) == {'critic'}
  np.testing.assert_allclose(updates['critic']['kernel'], -2.0 / np.sqrt(10) * np.ones(2), rtol=1e-6)  # clipped alone
  assert o.frozen == {'net'} and list(o.schedules) == ['critic'] and o.schedules['critic'](5) == 2.0


@pytest.mark.parametrize('name', optim.PRECONDITIONERS)
def test_every_optimiser_steps_downhill(name):
  o = optim.build(config(name=name, lr=0.05, schedule='constant'), 10, ['x'])
  x = {'x': {'kernel': jnp.asarray([1.0, -2.0])}}
  state = o.tx.init(x)
  for _ in range(5):
    updates, state = o.tx.update(x, state, x)  # the gradient of |x|^2 / 2
    x = jax.tree.map(jnp.add, x, updates)
  assert (jnp.abs(x['x']['kernel']) < jnp.asarray([1.0, 2.0])).all()


@pytest.mark.parametrize('every', [1, 2])
def test_switching_clipping_or_decay_keeps_the_names_of_the_state(every):
  def names(**fields):
    o = optim.build(config(every=every, **fields), 10, list(PARAMS))
    return list(sharding.flatten(jax.eval_shape(o.init, PARAMS)))

  assert names(clip=0.0) == names(clip=1.0) == names(clip=0.0, weight_decay=0.1) == names(clip=1.0, weight_decay=0.1)


def test_schedules():
  rate = lambda kind, step, **kw: float(
    optim.schedule(config(lr=1.0, warmup=4, schedule=kind, half_life=5, **kw), 12)(step)
  )
  for kind in optim.SCHEDULES:
    assert [rate(kind, s) for s in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
  assert rate('constant', 12) == 1.0
  assert rate('cosine', 8) == pytest.approx(0.5) and rate('cosine', 12) == pytest.approx(0.0, abs=1e-6)
  assert rate('linear', 8, lr_end=0.5) == pytest.approx(0.75) and rate('linear', 99, lr_end=0.5) == 0.5
  assert rate('rsqrt', 16) == pytest.approx(0.5)


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(name='adan'), "optim.name 'adan' is unknown; expected one of adam"),
    (dict(schedule='cos'), "optim.schedule 'cos' is unknown; expected one of constant"),
    (dict(name='adam', weight_decay=0.1), "'adam' has no weight decay; use adamw"),
    (dict(lr=-1e-3), 'optim.lr is -0.001; expected 0 or more'),
    (dict(clip=-1.0), 'optim.clip is -1.0; expected 0 or more'),
    (dict(weight_decay=float('nan')), 'optim.weight_decay is nan; expected 0 or more'),
    (dict(b1=1.0), 'optim.b1 is 1.0; expected 0 or more and less than 1'),
    (dict(b2=-0.1), 'optim.b2 is -0.1; expected 0 or more and less than 1'),
    (dict(decay='('), r"optim.decay '\(' is not a regular expression: missing \)"),
    (dict(groups=dict(net=dict(clip=-1.0))), 'optim.clip is -1.0'),
    (dict(groups=dict(critc=dict(lr=1.0))), r"groups has \['critc'\], but the players are"),
    (dict(groups=dict(net=dict(frozen=True), critic=dict(frozen=True))), 'freezes all players'),
    (dict(groups=dict(net=dict(lr='abc'))), r"optim.groups.net.lr is 'abc'; expected a value like 0\."),
    (dict(groups=dict(net=dict(frozen='no'))), "optim.groups.net.frozen is 'no'; expected a value like False"),
    (dict(groups=dict(net=dict(every=2.5))), 'optim.groups.net.every is 2.5; expected a value like 1'),
    (dict(groups=dict(net=dict(decay=3))), 'optim.groups.net.decay is 3; expected a value like'),
    (dict(groups=dict(net=dict(rate=1.0))), r"groups.net has the unknown fields \['rate'\]"),
  ],
)
def test_mistakes_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    optim.build(config(**fields), 10, list(PARAMS))


def test_every_second_step_with_the_rate_of_that_step():
  c = config(name='sgd', b1=0.0, lr=1.0, schedule='halving', half_life=2, clip=0.0, groups=dict(critic=dict(every=2)))
  o = optim.build(c, 10, list(PARAMS))
  state, moves = o.init(PARAMS), []
  for _ in range(5):
    updates, state = o.tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    moves.append((float(updates['net']['dense']['bias'][0]), float(updates['critic']['kernel'][0])))
  assert moves == [(-1.0, -1.0), (-1.0, 0.0), (-0.5, -0.5), (-0.5, 0.0), (-0.25, -0.25)]
  with pytest.raises(ValueError, match='half_life is 0; schedule "halving" needs'):
    optim.build(config(schedule='halving'), 10, ['x'])
  with pytest.raises(ValueError, match=r'optim.every is 0'):
    optim.build(config(every=0), 10, ['x'])
