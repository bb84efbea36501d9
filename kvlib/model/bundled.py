"""The bundled models' recipes: architecture, data mixture, stages of context length, seed."""

from dataclasses import dataclass, replace

from kvlib.cache.sharing import owners_of

VOCABULARY = 4096


@dataclass(frozen=True)
class Recipe:
    """All that determines a bundled model besides the text at hand.

    `stages` are (context in tokens, tokens to read at that context); `recall_fraction` of the sequences carry notes
    to be recalled; the loss on their answers counts `answer_weight` times. `mixture` weighs the sources of text.
    """

    config: dict
    stages: tuple[tuple[int, int], ...]
    recall_fraction: float
    answer_weight: float = 8.0
    mixture: tuple[tuple[str, float], ...] = (("stdlib", 0.5), ("packages", 0.35), ("wikitext", 0.15))
    batch_tokens: int = 8192
    micro_batch_tokens: int = 2048
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup_steps: int = 40
    decay_fraction: float = 0.35
    seed: int = 0

    @property
    def total_tokens(self) -> int:
        return sum(tokens for _, tokens in self.stages)


TINY_GPT2 = Recipe(
    config=dict(
        model_type="gpt2",
        n_layer=8,
        n_embd=256,
        n_head=4,
        n_positions=1024,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    stages=((256, 6_000_000), (512, 4_000_000), (1024, 5_000_000)),
    recall_fraction=0.4,
)

RECIPES = {
    "tiny-gpt2": TINY_GPT2,
    "tiny-gpt2-shared": replace(TINY_GPT2, config=TINY_GPT2.config | {"layer_owners": owners_of("groups-2", 8)}),
    "tiny-qwen2": Recipe(
        config=dict(
            model_type="qwen2",
            num_hidden_layers=6,
            hidden_size=256,
            intermediate_size=640,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_theta=100_000.0,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        ),
        stages=((256, 6_000_000), (512, 3_000_000), (1024, 3_000_000), (2048, 4_500_000)),
        recall_fraction=0.7,
    ),
}
