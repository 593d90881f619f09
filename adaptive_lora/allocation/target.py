"""`Target`: what a shape, a budget and a rule know of a linear module, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A linear module that carries an adapter. B A has shape (out_features, in_features)."""

    name: str  # full dotted name in the base model
    kind: str  # the name inside its layer, such as "attention.self.query": the same in every layer
    # the list of layers it belongs to, such as "encoder.layer"; "" when the model has none
    stack: str
    layer: int  # 0-based among the layers of this stack that carry targets
    n_layers: int  # how many such layers the stack has
    attention: bool  # inside an attention module (otherwise: feed-forward)
    in_features: int  # I
    out_features: int  # O

    @property
    def cost(self) -> int:
        """Trainable parameters of one component: I + O."""
        return self.in_features + self.out_features

    @property
    def full_rank(self) -> int:
        """The largest rank B A can have: min(I, O)."""
        return min(self.in_features, self.out_features)
