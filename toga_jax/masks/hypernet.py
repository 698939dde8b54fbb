"""The hypernetwork: one small GRU that makes all decisions together."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from toga_jax import budget
from toga_jax.masks import space


class HyperNetwork(nn.Module):
  """Logits of every decision, from a fixed random input per structure.

  Input [S, 32] -> bidirectional GRU over the S = L * groups structures in
  network order -> LayerNorm, GELU -> one linear head per structure (DISP-LLM,
  section 3.3; same sizes). `heads` is `space.decisions(...)`.

  Call returns a decision tree of [L, n] logits, near zero at the start: what
  the search starts from is the prior that is added to them.
  """

  num_layers: int
  heads: Mapping[str, Mapping[str, int]]
  input_size: int = 32
  hidden_size: int = 64

  @nn.compact
  def __call__(self) -> space.Tree:
    """Returns the decision tree of logits, float32."""
    used = {g for groups in self.heads.values() for g in groups}
    groups = [g for g in budget.GROUPS if g in used]
    length = self.num_layers * len(groups)
    # A constant of the architecture, not a parameter: the same in every run.
    codes = jax.random.normal(jax.random.key(0), (length, self.input_size))
    forward = nn.RNN(nn.GRUCell(self.hidden_size))
    backward = nn.RNN(nn.GRUCell(self.hidden_size))
    h = nn.Bidirectional(forward, backward)(codes)  # [S, 2 * hidden]
    h = nn.gelu(nn.LayerNorm()(h))
    h = h.reshape(self.num_layers, len(groups), -1)
    small = nn.initializers.variance_scaling(0.01, 'fan_in', 'normal')
    logits = {'keep': {}, 'salient': {}}
    for decision, widths in self.heads.items():
      for group, n in widths.items():
        x = h[:, groups.index(group)]  # [L, 2 * hidden]
        name = f'{decision}_{group}'
        kernel = self.param(
          f'{name}_kernel', _per_layer(small), (self.num_layers, x.shape[-1], n)
        )
        bias = self.param(
          f'{name}_bias', nn.initializers.zeros, (self.num_layers, n)
        )
        logits[decision][group] = jnp.einsum('LH,LHn->Ln', x, kernel) + bias
    return logits


def _per_layer(
  init: nn.initializers.Initializer,
) -> nn.initializers.Initializer:
  """Applies a 2-D initializer to each layer of [L, in, out]."""

  def stacked(key, shape, dtype=jnp.float32):
    keys = jax.random.split(key, shape[0])
    return jax.vmap(lambda k: init(k, shape[1:], dtype))(keys)

  return stacked
