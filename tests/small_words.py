"""Words that small tokenizers are made of."""

from transformers import PreTrainedTokenizerFast


def tokenizer(words):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, words[0])), eos_token=words[0])


WORDS = tokenizer([f"w{i}" for i in range(50)])
