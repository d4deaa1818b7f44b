"""Routers: how a prompt's states become logits over the actions of each layer.

Owns window pooling and the stacked weights of all layers' routers. The weights are plain tensors, never part of the
base model's module tree. Knows nothing of budgets, plans in force or files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from dynadepth.config import RouterConfig
from dynadepth.errors import ConfigError
from dynadepth.plans import NUM_ACTIONS

__all__ = [
    "Bottleneck",
    "Pooling",
    "RouterHeads",
    "all_logits",
    "last_token_state",
    "pool",
    "window_means",
]


def window_means(hidden_states: Tensor, prompt_mask: Tensor, num_windows: int) -> Tensor:
    """Average the prompt's real tokens over contiguous windows.

    Of n real tokens, window w holds the tokens floor(w n / W) up to max(floor(w n / W) + 1, floor((w + 1) n / W)), so
    that a prompt shorter than W repeats tokens instead of leaving windows empty. Padding may stand anywhere and its
    values never matter. Nothing waits for the device.

    Args:
        hidden_states: States. Shape (batch, tokens, hidden), any floating dtype.
        prompt_mask: Non-zero for real tokens. Shape (batch, tokens), bool or integer.
        num_windows: W.

    Returns:
        Means; zeros for a row without real tokens. Shape (batch, num_windows, hidden), float32.

    Source:
        Window pooling of Dr.LLM (arXiv 2510.12773); deviation: only the prompt's real tokens are averaged, never
        padding or the scored answer.
    """
    members = _window_members(prompt_mask, num_windows)
    return Pooling.averaging(prompt_mask, members)(hidden_states)


def last_token_state(hidden_states: Tensor, prompt_mask: Tensor) -> Tensor:
    """Return the state of the last real token of each row.

    Args:
        hidden_states: States. Shape (batch, tokens, hidden), any floating dtype.
        prompt_mask: Non-zero for real tokens. Shape (batch, tokens), bool or integer.

    Returns:
        States; zeros for a row without real tokens. Shape (batch, hidden), float32.
    """
    real = prompt_mask.to(torch.bool)
    column = torch.arange(real.shape[1], device=real.device)
    last = (column * real).amax(dim=1)
    states = hidden_states[torch.arange(len(last), device=real.device), last].to(torch.float32)
    return states.masked_fill(real.any(dim=1).logical_not().unsqueeze(1), 0.0)


def pool(hidden_states: Tensor, prompt_mask: Tensor, config: RouterConfig) -> Tensor:
    """Return everything a router reads of a prompt: the window means, then the last token's state if it is used.

    Args:
        hidden_states: States entering a layer. Shape (batch, tokens, hidden), any floating dtype.
        prompt_mask: Non-zero for real tokens. Shape (batch, tokens), bool or integer.
        config: Shape of the routers.

    Returns:
        Views. Shape (batch, config.num_views, hidden), float32.
    """
    return Pooling.of(prompt_mask, config)(hidden_states)


@dataclass(frozen=True, slots=True, eq=False)
class Pooling:
    """What `pool` needs of a batch's mask, made once for all layers that read the batch.

    Args:
        weights: Of each token in each view. Shape (batch, views, tokens), float32.
        padding: True for tokens that are no prompt's. Shape (batch, tokens, 1), bool.
        spans: The tokens of each view, from one up to another, if the host knows them and no row is padded; means over
            these are cheaper than products with mostly zeros.
    """

    weights: Tensor
    padding: Tensor
    spans: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, prompt_mask: Tensor, config: RouterConfig) -> "Pooling":
        """Return that of the views that a router reads; `pool` has the arguments."""
        members = _window_members(prompt_mask, config.num_windows)
        if config.last_token:
            members = torch.cat([members, _last_member(prompt_mask)], dim=1)
        return cls.averaging(prompt_mask, members)

    @classmethod
    def averaging(cls, prompt_mask: Tensor, members: Tensor) -> "Pooling":
        """Return that of the means over some members of each row. Shape of `members` as `weights`, bool."""
        weights = members.to(torch.float32)
        weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1.0)
        return cls(weights, prompt_mask.to(torch.bool).logical_not().unsqueeze(2))

    def unpadded(self) -> "Pooling":
        """Return the pooling for rows of which none is padded; this waits for the device."""
        held = self.weights[0] > 0
        first = held.int().argmax(dim=1)
        bounds = torch.stack([first, first + held.sum(dim=1)], dim=1).tolist()
        return replace(self, spans=tuple((begin, end) for begin, end in bounds))

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return the views of states. Shape (batch, views, hidden), float32."""
        if self.spans is not None:
            means = [
                hidden_states[:, begin:end].mean(dim=1, dtype=torch.float32)
                for begin, end in self.spans
            ]
            return torch.stack(means, dim=1)
        # A fully masked position may hold inf or nan, and 0 * nan is nan.
        clean = hidden_states.masked_fill(self.padding, 0.0)
        return self.weights @ clean.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """Two linear layers with a GELU between them, for all decoder layers at once.

    Args:
        first_weight: Shape (num_layers, hidden, bottleneck), float32.
        first_bias: Shape (num_layers, bottleneck), float32.
        second_weight: Shape (num_layers, bottleneck, 3), float32.
        second_bias: Shape (num_layers, 3), float32.
    """

    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    def logits(self, layer_idx: int, views: Tensor) -> Tensor:
        """Return one layer's logits, averaged over the views.

        Args:
            layer_idx: The decoder layer.
            views: Shape (batch, views, hidden), float32.

        Returns:
            Shape (batch, 3), float32.
        """
        inner = functional.gelu(views @ self.first_weight[layer_idx] + self.first_bias[layer_idx])
        # The mean passes through the second linear layer, so it is taken where there is less to multiply.
        return inner.mean(dim=1) @ self.second_weight[layer_idx] + self.second_bias[layer_idx]

    def all_logits(self, views: Tensor) -> Tensor:
        """Return the logits of all layers, averaged over the views.

        Args:
            views: Shape (num_layers, batch, views, hidden), float32.

        Returns:
            Shape (num_layers, batch, 3), float32.
        """
        num_layers, batch, num_views, hidden = views.shape
        flat = views.reshape(num_layers, batch * num_views, hidden)
        inner = functional.gelu(
            torch.baddbmm(self.first_bias.unsqueeze(1), flat, self.first_weight)
        )
        mean = inner.view(num_layers, batch, num_views, -1).mean(dim=2)
        return torch.baddbmm(self.second_bias.unsqueeze(1), mean, self.second_weight)

    def tensors(self) -> dict[str, Tensor]:
        """Return the four tensors by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, eq=False)
class RouterHeads:
    """The routers of all layers: a perceptron over the windows and, if used, one over the last token's state.

    Immutable and without gradients; safe to share between policies and threads.

    Args:
        config: Their shape.
        windows: Weights of the perceptron whose logits are averaged over the windows.
        last: Weights of the perceptron over the last token's state, added to the former; None if not used.

    Raises:
        ConfigError: A tensor has another shape or dtype than the configuration asks for, or is not finite.

    Source:
        Router of Dr.LLM (arXiv 2510.12773): Linear-GELU-Linear for each layer, logits averaged over windows;
        deviation: the second perceptron on the last token's state.
    """

    config: RouterConfig
    windows: Bottleneck
    last: Bottleneck | None = None

    def __post_init__(self) -> None:
        if (self.last is not None) != self.config.last_token:
            raise ConfigError(
                f"RouterConfig.last_token is {self.config.last_token}, but weights for the last token are "
                f"{'missing' if self.last is None else 'given'}; give both or neither"
            )
        given, expected = self.state_dict(), self.expected_shapes(self.config)
        for name, shape in expected.items():
            tensor = given[name]
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ConfigError(
                    f"router tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected "
                    f"torch.float32 of shape {shape} for {self.config.num_layers} layers of width "
                    f"{self.config.hidden_size}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(
                    f"router tensor {name!r} holds values that are not finite; train the routers again"
                )

    def logits(self, layer_idx: int, pooled: Tensor) -> Tensor:
        """Return one layer's logits.

        Args:
            layer_idx: The decoder layer.
            pooled: What `pool` made of the states entering that layer. Shape (batch, views, hidden), float32.

        Returns:
            Shape (batch, 3), float32, order SKIP, EXECUTE, REPEAT.
        """
        logits = self.windows.logits(layer_idx, pooled[:, : self.config.num_windows])
        if self.last is not None:
            logits = logits + self.last.logits(layer_idx, pooled[:, self.config.num_windows :])
        return logits

    def all_logits(self, features: Tensor) -> Tensor:
        """Return the logits of all layers for cached features.

        Args:
            features: What `pool` made of the states entering each layer. Shape (prompts, num_layers, views, hidden),
                float32; views beyond the configured ones must not be there.

        Returns:
            Shape (prompts, num_layers, 3), float32.
        """
        return all_logits(self.windows, self.last, self.config.num_windows, features)

    def varying_layers(self) -> tuple[int, ...]:
        """Return the layers whose logits depend on the prompt, ascending; training leaves the others constant."""
        varying = torch.zeros(self.config.num_layers, dtype=torch.bool)
        for part in (self.windows, self.last):
            if part is not None:
                varying |= (part.second_weight != 0).any(dim=2).any(dim=1).cpu()
        return tuple(varying.nonzero().squeeze(1).tolist())

    def constant_logits(self) -> Tensor:
        """Return the logits of layers that do not depend on the prompt. Shape (num_layers, 3), float32, on the host."""
        logits = self.windows.second_bias
        if self.last is not None:
            logits = logits + self.last.second_bias
        return logits.cpu()

    def to(self, device: torch.device | str) -> "RouterHeads":
        """Return the same routers with their tensors on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.state_dict().items()}
        return self.from_state_dict(self.config, moved)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors under the names that a routers file gives them."""
        parts = {"windows": self.windows, "last": self.last}
        return {
            f"{part}.{name}": tensor
            for part, weights in parts.items()
            if weights is not None
            for name, tensor in weights.tensors().items()
        }

    @staticmethod
    def expected_shapes(config: RouterConfig) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that routers of this configuration have."""
        layers, width, inner = config.num_layers, config.hidden_size, config.bottleneck
        shapes: dict[str, tuple[int, ...]] = {
            "first_weight": (layers, width, inner),
            "first_bias": (layers, inner),
            "second_weight": (layers, inner, NUM_ACTIONS),
            "second_bias": (layers, NUM_ACTIONS),
        }
        parts = ("windows", "last") if config.last_token else ("windows",)
        return {f"{part}.{name}": shape for part in parts for name, shape in shapes.items()}

    @classmethod
    def from_state_dict(cls, config: RouterConfig, tensors: Mapping[str, Tensor]) -> "RouterHeads":
        """Make routers from what `state_dict` returned.

        Args:
            config: Their shape.
            tensors: Name to tensor, exactly the names of `expected_shapes`.

        Returns:
            The routers, without gradients.

        Raises:
            ConfigError: A tensor is missing, unknown or of the wrong shape or dtype.
        """
        expected = cls.expected_shapes(config)
        wrong = sorted(set(expected) ^ set(tensors))
        if wrong:
            state = "missing" if wrong[0] in expected else "unknown"
            raise ConfigError(
                f"router tensor {wrong[0]!r} is {state}; expected exactly {', '.join(sorted(expected))}"
            )

        def part(prefix: str) -> Bottleneck:
            names = [item.name for item in fields(Bottleneck)]
            return Bottleneck(**{name: tensors[f"{prefix}.{name}"].detach() for name in names})

        return cls(config, part("windows"), part("last") if config.last_token else None)


def all_logits(
    windows: Bottleneck, last: Bottleneck | None, num_windows: int, features: Tensor
) -> Tensor:
    """Return what `RouterHeads.all_logits` returns, of weights that are no checked routers yet."""
    by_layer = features.transpose(0, 1)
    logits = windows.all_logits(by_layer[:, :, :num_windows])
    if last is not None:
        logits = logits + last.all_logits(by_layer[:, :, num_windows:])
    return logits.transpose(0, 1)


def _window_members(prompt_mask: Tensor, num_windows: int) -> Tensor:
    """Return which token is in which window. Shape (batch, num_windows, tokens), bool."""
    real = prompt_mask.to(torch.bool)
    position = real.to(torch.int64).cumsum(dim=1) - 1
    count = real.to(torch.int64).sum(dim=1, keepdim=True)
    window = torch.arange(num_windows, device=prompt_mask.device).unsqueeze(0)
    first = torch.div(window * count, num_windows, rounding_mode="floor")
    after = torch.div((window + 1) * count, num_windows, rounding_mode="floor")
    after = torch.maximum(after, first + 1)
    inside = (position.unsqueeze(1) >= first.unsqueeze(2)) & (
        position.unsqueeze(1) < after.unsqueeze(2)
    )
    return inside & real.unsqueeze(1)


def _last_member(prompt_mask: Tensor) -> Tensor:
    """Return which token is the last real one. Shape (batch, 1, tokens), bool."""
    real = prompt_mask.to(torch.bool)
    position = real.to(torch.int64).cumsum(dim=1)
    return (real & (position == position[:, -1:])).unsqueeze(1)
