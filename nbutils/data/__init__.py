"""Data: from a corpus to token blocks on disk.

Sources read documents; documents are cleaned, split and checked for leakage; a tokenizer turns them into blocks;
a data card describes the result. `prepare_data` is the whole way.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batches": [
            "IGNORE_INDEX",
            "RandomChunks",
            "Rows",
            "TrainingOrder",
            "UNLABELLED",
            "WithEmptyRow",
            "collate",
            "in_order",
            "permutation",
        ],
        "bytes_of_tokens": ["token_bytes", "token_lengths"],
        "corpora": ["corpus_versions", "locate_corpus"],
        "data_card": ["copies_dropped", "headline", "left_out"],
        "fingerprints": ["DATA_FOLDER", "MODELS", "check_prepared", "fingerprint", "output_fingerprint"],
        "preparation": ["PreparedData", "load_data", "prepare_data", "small_data", "small_questions"],
        "settings": ["DataConfig", "check_config"],
        "sources": ["CorpusRequest", "TASKS", "UnreachableCorpusError"],
        "tokenization": ["load_tokenizer", "tokenize"],
    },
)
