"""Tiny byte-level BPE tokenizers like those of decoders."""

import os
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_TEXTS = ["This product text title", "This product image and its image", "and its text title of an image"] * 5


def write_byte_bpe(folder: str | os.PathLike, begin: str = "", last: str = "") -> Path:
  """Saves a tokenizer whose `eos_token` ends a turn and not a text, as in Qwen's instruct models.

  Args:
    folder: Folder to write to.
    begin: Token at the start of every text, as in Llama; "" for none, as in Qwen.
    last: Special token with the largest id, as Gemma 3's placeholder of images; "" for none.
  """
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = [END_OF_TEXT, END_OF_TURN, *filter(None, [begin])]
  tokenizer.train_from_iterator(
    _TEXTS,
    trainers.BpeTrainer(
      vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    ),
  )
  if begin:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
  if last:
    tokenizer.add_special_tokens([last])
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN).save_pretrained(folder)
  return Path(folder)
