"""The architectures of Hugging Face that we read and write, by their model_type."""

from qkv_jax.interop.architecture import Architecture
from qkv_jax.interop.decoders import GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, QWEN2, QWEN3
from qkv_jax.interop.encoder_decoders import T5
from qkv_jax.interop.encoders import BERT, ROBERTA

TABLE: dict[str, Architecture] = {
    row.model_type: row
    for row in (GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA2, GEMMA3, BERT, ROBERTA, T5)
}
