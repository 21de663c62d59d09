"""A character language model on text that every machine has: the default, and the base of all.

    python -m experiments.train                      # this config
    python -m experiments.train --config=configs/char_lm.py --config.train.num_steps=200

Reached on two CPU cores (Python 3.11's documentation): 1.2923 nats per character over the full
validation text, in 216 s; peak memory 0.93 GB.

Every field that a config may set stands here, with its unit. Other configs start from
`get_config()` and change it.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "char_lm"  # the run directory's default name: runs/<name>
    config.seed = 0  # parameters, batches and dropout all derive from it

    # causal_lm: the next token | masked_lm: hidden tokens, both sides seen
    # recall: the value that went with a key | cue: what stood in the noise | copying: all of it
    # repeats: the next token of what repeats | modular_addition: a sum
    # Classes of rows: listops: the value of an expression | digits: of images, pixel by pixel
    # which_document: a passage is from | same_document: whether two passages are from one
    # senses: hidden words of sentences | spans: questions about a passage
    # translation: a sentence, from its counterpart
    config.task = "causal_lm"

    config.data = data = ConfigDict()
    # python_docs: what every Python carries | text_file: data.path
    # aozora: the same of Aozora Bunko, without ruby, notes and colophon
    # token_files: the folder data.path that experiments.prepare_tokens has made, of any size
    # token_documents (causal_lm): the same, attention staying within a document
    data.corpus = "python_docs"
    data.path = placeholder(str)  # a file, a glob or a folder; see also data.pairs
    data.tokenizer = "char"  # char | byte | bpe | unigram (SentencePiece) | mecab (Japanese words)
    data.vocab_size = 4096  # bpe, unigram, mecab: entries to train; where data are made: ids
    data.tokenizer_path = placeholder(str)  # bpe, unigram: load this file instead of training
    data.validation_fraction = 0.1  # of text, images: the last part; of all sums: never trained on
    data.context = 128  # tokens a training window has
    data.longer = ()  # causal_lm: in the end, evaluate also on windows so many times longer
    data.mask_rate = 0.15  # masked_lm, senses: share of the tokens that are to be guessed
    data.num_pairs = 8  # recall: keys with a value in a window
    data.min_pairs = placeholder(int)  # recall: as few in some training windows; None: num_pairs
    data.ramp_steps = 0  # recall: the most in a training window grows from min_pairs over as many
    data.min_length = 16  # listops: tokens of the shortest expression
    data.max_depth = 10  # listops: operations within one another, and digits in the last of them
    data.max_args = 10  # listops: arguments of an operation
    data.num_documents = 10  # which_document: the longest ones, which are to be told apart
    # Of translation:
    data.pairs = "numbers_de"  # generated: numbers_de | numbers_ja | dates; or file: data.path
    data.num_examples = 10_000  # generated pairs
    data.target_path = placeholder(str)  # a line for each of data.path; None: that is a TSV of both
    data.test_path = placeholder(str)  # measured at the end; None: the validation part
    data.test_target_path = placeholder(str)  # as data.target_path
    data.bleu_tokenizer = "13a"  # sacrebleu's, for files: 13a | intl | char | zh | none

    config.model = model = ConfigDict()
    model.kind = "transformer"  # of translation also: recurrent | convolutional
    model.num_layers = 4
    model.width = 128  # D, the residual stream
    model.num_heads = 4  # N
    model.num_kv_heads = placeholder(int)  # K; None: as many as heads (1: multi-query)
    model.head_dim = placeholder(int)  # H; None: width / num_heads
    model.heads_per_layer = placeholder(tuple)  # ((N, K), ...) of pruned layers; None: as above
    model.mixer = "attention"  # names in models.MIXERS: "gated_delta,attention" alternates
    # What some mixers read; setting one that no layer of model.mixer reads is an error:
    model.window = 64  # tokens that local attention looks back; contextual positions (cope)
    model.block_size = 16  # tokens in a block (bigbird, moba, nsa), a stride (strided, fixed)
    model.num_blocks = 4  # blocks that a query selects (moba, nsa)
    model.num_global = 1  # first tokens (longformer, streaming), blocks (bigbird) that all see
    model.num_random = 1  # blocks that a block of queries draws (bigbird)
    model.attention_scale = placeholder(float)  # of the logits (attention); None: 1 / sqrt(H)
    model.attention_softcap = 0.0  # cap * tanh(logits / cap) in a stack's own attention; 0: none
    model.window_blocks = 3  # an odd number of near blocks that it sees, its own included (bigbird)
    model.top_k = 32  # keys that a query keeps (topk) or retrieves (memory)
    model.num_features = 128  # random features of a head (performer)
    model.rank = 32  # rows (linformer), landmarks (nystrom), width of the latent (latent)
    model.conv_width = 4  # tokens that a short (or a convolutional model's) convolution sees
    model.chunk_size = 64  # tokens that the linear family computes at once: speed alone
    model.mlp_width = placeholder(int)  # F; None: 4 * width; 0: attention (or what mixes) alone
    model.activation = "relu_squared"  # gelu | gelu_tanh | swiglu | geglu | relu | relu_squared
    model.norm = "rms"  # layer | rms | zero_centered_rms (Gemma's) | none
    model.norm_epsilon = placeholder(float)  # None: 1e-5 for layer, 1e-6 for rms
    model.norm_position = "pre"  # pre | post | both
    model.position = "rotary"  # learned | sinusoidal | rotary | alibi | relative (T5) | none
    model.rotary_base = 10_000.0
    model.relative_buckets = 32  # of T5's distances
    model.relative_distance = 128  # from here on all keys share the last of them
    model.rotary_scaling = placeholder(tuple)  # Llama 3.1's: factor, turns from, to, old length
    model.local_rotary_base = placeholder(float)  # of sliding_window; None: rotary_base, scaled too
    model.qk_norm = True  # normalise queries and keys per head
    model.use_bias = False  # biases in projections and layer norms
    model.qkv_bias = placeholder(bool)  # in those to queries, keys and values; None: use_bias
    model.share_kv = False  # one projection for keys and values
    model.share_qk = False  # one projection for queries and keys
    model.tie_embeddings = False  # output head = token embedding transposed
    model.scale_embeddings = False  # token embeddings * sqrt(width), as Gemma's
    model.scale_logits = False  # the last residual stream / sqrt(width), as T5's
    model.zero_init_outputs = True  # each block starts as the identity
    model.init_std = 0.02  # of the initial embeddings and matrices; outputs: / sqrt(2 num_layers)
    model.logit_softcap = 15.0  # cap * tanh(logits / cap); 0: none
    model.dropout_rate = 0.0
    # Of translation:
    model.encoder_mixer = "attention"  # transformer: as model.mixer, which is the decoder's
    model.cell = "lstm"  # recurrent: lstm | gru
    model.bidirectional = True  # recurrent: half of the encoder's width reads backwards
    model.attention = "bahdanau"  # recurrent: none | luong | bahdanau
    model.score = "general"  # luong: dot | general | concat
    model.input_feeding = False  # luong: the cell also reads what the last step found

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "muon"  # adamw | muon (matrices by Muon, the rest by AdamW)
    optimizer.learning_rate = 2e-2  # AdamW's peak
    optimizer.muon_learning_rate = 2e-2  # Muon's peak
    optimizer.schedule = "linear"  # cosine | linear | constant, after the warm-up
    optimizer.warmup_steps = 20
    optimizer.final_fraction = 0.0  # the schedule ends at this fraction of the peak
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.0  # on matrices only
    optimizer.clip_norm = 1.0  # of the global gradient; 0: none
    optimizer.accumulate = 1  # micro-batches whose gradients are averaged into one step

    # The devices, by what they share: their product divides how many there are; docs/scaling.md.
    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # rows of a batch; -1: as many devices as are left and divide the batch
    mesh.fsdp = 1  # rows too, and each parameter, its gradient and its optimizer state
    mesh.tensor = 1  # heads, hidden units of the MLP, the vocabulary; tokens of norms
    mesh.context = 1  # tokens of a window
    mesh.zigzag = False  # tokens in an order that gives devices of `context` equal causal work

    config.train = train = ConfigDict()
    train.num_steps = 1500
    train.stop_accuracy = placeholder(float)  # stop once validation reaches it; None: never
    train.batch_size = 16  # windows a step
    train.eval_every = 250  # steps
    train.eval_batches = 20  # random validation batches per evaluation while training
    train.save_every = 250  # steps between checkpoints; 0: only at the end
    train.save_minutes = 0.0  # after which one is made too, if none was; 0: never
    train.keep = 2  # newest checkpoints kept
    train.keep_every = 0  # steps whose multiples are saved, and kept for good; 0: none
    # Stops where the loss is so many times the median of 100, five steps in a row; 0: never.
    train.spike_factor = 0.0
    train.log_every = 10  # steps between metrics
    train.steps_per_dispatch = 10  # steps compiled into one call
    train.cpu_devices = 1  # on a CPU: devices made of it, for config.mesh
    train.compute_dtype = "float32"  # float32 | bfloat16; parameters stay float32
    train.remat = False  # recompute activations in the backward pass
    train.sample_tokens = 400  # length of the sample at the end: text to write, or with blanks
    train.figures = True  # draw the loss and the attention of each layer at the end
    train.wandb = False  # also log to Weights & Biases, where it is installed
    return config
