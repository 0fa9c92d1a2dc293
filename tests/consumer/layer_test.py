# SPDX-License-Identifier: Apache-2.0
"""A layer in somebody else's workspace, by the import that the README names."""

from __future__ import annotations

import unittest

import torch

from fused_moe import cutlass_fused_moe, topk_softmax

TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 5, 32, 16, 4, 2


class LayerTest(unittest.TestCase):
    """The whole way from router logits to the layer's output."""

    def test_output_matches_plain_pytorch(self) -> None:
        """SwiGLU experts, each token's two best, against a loop."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(torch.bfloat16) / 4

        x, logits = draw(TOKENS, HIDDEN), draw(TOKENS, EXPERTS)
        fc1, fc2 = draw(EXPERTS, 2 * INTER, HIDDEN), draw(EXPERTS, HIDDEN, INTER)
        scales, experts = topk_softmax(logits, TOP_K)
        output = cutlass_fused_moe(x, experts, scales, fc1, fc2, torch.bfloat16, quant_scales=None)

        expected = torch.zeros(TOKENS, HIDDEN)
        for token in range(TOKENS):
            for slot in range(TOP_K):
                expert = int(experts[token, slot])
                up, gate = (fc1[expert].float() @ x[token].float()).split(INTER)
                hidden = torch.nn.functional.silu(gate) * up
                expected[token] += scales[token, slot] * (fc2[expert].float() @ hidden)
        error = (output.float() - expected).norm() / expected.norm()
        self.assertLess(float(error), 1e-2)


if __name__ == "__main__":
    unittest.main()
