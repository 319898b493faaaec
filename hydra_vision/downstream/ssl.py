"""Masking for a scan model, in the form that lightly's `MaskedVisionTransformerTIMM` takes.

Attention does not care in which order it gets its tokens; a scan does. What dropping and masking mean here:

* Dropping (MAE): the scan runs over the kept patches as if they were neighbours. Kept patches have to stay in row-major
  order, and only a position embedding (`pos_embed='learn'`) tells the model how far apart two of them are.
* Replacing (SimMIM): the sequence keeps its length and order; the mask token is one more token that the scan passes
  through, with a step size and a decay of its own.
"""

import torch

__all__ = ['random_token_mask']


def random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.75,
    *,
    num_prefix_tokens: int = 0,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random indices of tokens to keep and to mask, both in ascending order: kept tokens stay in scan order.

    lightly's function of this name returns them shuffled.

    Args:
        size: (B, L), prefix tokens counted.
        mask_ratio: Share of the patches that is masked.
        num_prefix_tokens: Tokens in front that are always kept (1 with a class token, 0 without).
        device: Of the result.

    Returns:
        idx_keep (B, K) and idx_mask (B, L - K), int64.

    Raises:
        ValueError: A ratio outside [0, 1), or no patch to keep.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f'mask_ratio={mask_ratio}; allowed: 0 <= mask_ratio < 1')
    B, L = size
    keep = int((L - num_prefix_tokens) * (1 - mask_ratio) + 1e-6)  # 100 * (1 - 0.9) is 9.99...
    if keep < 1:
        raise ValueError(f'mask_ratio={mask_ratio} keeps none of {L - num_prefix_tokens} patches')
    order = torch.rand(B, L - num_prefix_tokens, device=device).argsort(1) + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=device).expand(B, num_prefix_tokens)
    idx_keep = torch.cat([prefix, order[:, :keep].sort(1).values], dim=1)
    return idx_keep, order[:, keep:].sort(1).values
