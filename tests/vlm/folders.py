"""Transformers folders as save_pretrained writes them: the small models of `tests.vlm.models`, each with the processor of its
family over a tokenizer of 64 words, made without any file from elsewhere."""

import functools
import tempfile

from tests.vlm.models import vlm

WORDS = ["what", "is", "this", "?", "a", "cat", "user", ":", "answer"]
END = 63
CHAT = (
    "{% for m in messages %}user : {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
)


def tokenizer(special):
    """Words by white space. special: {id: word} of those that stand for themselves wherever they are in a text."""
    import tokenizers
    import transformers

    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), 64))]
    for i, word in {0: "<unk>", END: "</s>", **special}.items():
        words[i] = word
    for i, word in enumerate(WORDS, 10):
        words[i] = word
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.decoder = None
    made.add_special_tokens([tokenizers.AddedToken(w, special=True) for w in ("<unk>", "</s>", *special.values())])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>", eos_token="</s>")


def llava(chat=True):
    from transformers import CLIPImageProcessor, LlavaProcessor

    pictures = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(
        pictures, tokenizer({60: "<image>"}), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT.replace("IMAGE", "<image> ") if chat else None,
    )  # fmt: skip


def qwen2_vl():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    special = {60: "<|image_pad|>", 59: "<|video_pad|>", 61: "<|vision_start|>", 62: "<|vision_end|>"}
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    options = dict(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**options), tokenizer(special), Qwen2VLVideoProcessor(**options),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|> "),
    )  # fmt: skip


def idefics3():
    """Writes tokens of its own around each image."""
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    special = {60: "<image>", 58: "<fake_token_around_image>", 59: "<global-img>", 57: "<end_of_utterance>"}
    options = dict(do_image_splitting=False, size={"longest_edge": 64}, max_image_size={"longest_edge": 64})
    return Idefics3Processor(
        Idefics3ImageProcessor(**options), tokenizer(special), image_seq_len=16, chat_template=CHAT.replace("IMAGE", "<image>")
    )


def idefics3_tiles():
    """Tiles of 64 x 64 with a word for the place of each, and the whole image after them."""
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    places = {50 + 2 * i + j: f"<row_{i + 1}_col_{j + 1}>" for i in range(2) for j in range(2)}
    special = {60: "<image>", 58: "<fake_token_around_image>", 59: "<global-img>", 57: "<end_of_utterance>", **places}
    options = dict(do_image_splitting=True, size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    return Idefics3Processor(
        Idefics3ImageProcessor(**options), tokenizer(special), image_seq_len=16, chat_template=CHAT.replace("IMAGE", "<image>")
    )


def llava_next():
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 56], [56, 112]]
    )
    return LlavaNextProcessor(
        pictures, tokenizer({60: "<image>"}), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT.replace("IMAGE", "<image> "),
    )  # fmt: skip


@functools.cache
def folder(name):
    """The path of a folder, which is not to be changed."""
    made = tempfile.TemporaryDirectory()
    FOLDERS.append(made)
    vlm(name.removesuffix("_tiles"))[0].save_pretrained(made.name)
    PROCESSORS[name]().save_pretrained(made.name)
    return made.name


PROCESSORS = {
    "llava": llava, "llava_next": llava_next, "qwen2_vl": qwen2_vl, "idefics3": idefics3, "idefics3_tiles": idefics3_tiles,
}  # fmt: skip
FOLDERS = []
