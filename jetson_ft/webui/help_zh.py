"""The recipe's one-line helps in Simplified Chinese; the English ones stand in the schema."""

HELP = {
    "model": "`embedded`（自带的 SmolLM2-135M-Instruct，可离线使用）、Hub 上的模型名，例如 "
    "`microsoft/phi-1_5`，或含有 safetensors、GGUF 权重的文件夹。",
    "quantize": "冻结权重的格式；int8 和 nf4 由 bitsandbytes 提供。",
    "double_quantize": "使用 nf4 时连缩放系数也量化（每个权重节省 0.4 位）。",
    "precision": "计算精度；`auto` 在设备擅长 bf16 时选用 bf16。",
    "data.train": "要学习的数据：`bundled`（自带的中文数据）、一个文件（.json、.jsonl、.csv、"
    ".parquet），或 Hub 上的数据集名，例如 `owner/name`。",
    "data.heldout": "不参与训练的数据：一个文件、从 `train` 末尾取出的条数，或 `auto`（自带数据用"
    "自带的留出集，否则取末尾 10 %，最多 60 条）。",
    "data.max_length": "一条数据最多多少个词元；超出部分被截断，或整条舍弃。",
    "data.over_length": "超过 `max_length` 的数据如何处理：truncate 截断，drop 舍弃。",
    "data.bad_rows": "遇到损坏或不完整的数据：refuse 结束任务，skip 跳过并计数。",
    "data.format": "每条数据的写法；`auto` 自动识别并告知结果。",
    "data.encoding": "文件的文字编码（`utf-8`、`gb18030` 等）；`auto` 自动识别。",
    "lora.rank": "两个适配器矩阵的秩。",
    "lora.alpha": "缩放的分子：更新量按 alpha / rank 计。不填则为 2 x rank。",
    "lora.dropout": "适配器之前的随机丢弃；占内存，很少有帮助。",
    "lora.targets": "哪些层加适配器：`all-linear`，或模块名列表。",
    "lora.rslora": "按 alpha / sqrt(rank) 缩放（rsLoRA）。",
    "lora.dora": "幅度与方向分开学习（DoRA），较慢。",
    "train.epochs": "把训练数据学几遍。",
    "train.max_steps": "最多多少个优化步；0 表示不限。",
    "train.max_minutes": "最多训练多少分钟；0 表示不限。测过头几步的用时后确定步数。",
    "train.learning_rate": "学习率的最高值。",
    "train.schedule": "预热之后学习率如何下降。",
    "train.warmup_steps": "学习率从零升到最高值所用的步数。",
    "train.weight_decay": "AdamW 的权重衰减。",
    "train.max_grad_norm": "梯度裁剪到这个范数。",
    "train.tokens_per_step": "每个优化步包含多少个词元（不含填充），按整条数据计。",
    "train.max_memory_gb": "为任务计划的内存，单位 GB（10^9 字节）；0 表示启动时的空闲内存。"
    "调小可给其他程序留出空间，只影响速度，不影响结果。",
    "train.seed": "数据顺序和适配器的随机种子。",
    "train.eval_every": "每多少步在留出数据上测量一次；0 自动选择，约占十分之一的时间。",
    "train.early_stopping": "连续多少次测量没有进步就结束；0 表示从不。",
    "train.checkpoint_minutes": "除测量时之外，每隔多少分钟保存一次检查点。",
    "train.keep_checkpoints": "保留最近多少个检查点；最好的一个始终保留。",
    "train.on_oom": "训练中内存不足时：stop 停止；shrink 从最近的检查点按更省内存的计划重新开始"
    "一次，只影响速度，不影响结果。",
    "eval.max_new_tokens": "对比时每个回答最多写多少个词元。",
    "eval.samples": "并排展示多少对回答。",
    "device.max_temperature_c": "开发板温度高于此值（摄氏度）时，在两步之间暂停训练，降温 5 度后"
    "继续；0 表示从不暂停。",
}
