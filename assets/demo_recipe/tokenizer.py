"""The tokenizer of the demonstration model: byte-level BPE over the recipe's own text, one token per digit.

Digits stay apart because sums are learned digit by digit; bytes underneath mean that nothing a user types is unknown.
"""

from __future__ import annotations

import itertools
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import Corpus

VOCABULARY = 3072
PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SAMPLE_TURNS = 60_000


def train_tokenizer(corpus: Corpus, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer with VOCABULARY tokens and the chat template, learned from a sample of the training chats."""
    turns = itertools.islice(corpus.chat(random.Random(seed)), SAMPLE_TURNS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (f"user\n{turn.question}\nassistant\n{turn.answer}\nsystem\n" for turn in turns),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
