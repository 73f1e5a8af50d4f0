"""Everything that the page says, in English and Simplified Chinese, each declared once."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.requests import cookie_parser

from jetson_ft import recipe
from jetson_ft.errors import UserError
from jetson_ft.runs import report
from jetson_ft.webui import translate
from jetson_ft.webui.help_zh import HELP

LANGUAGES = {"en": "English", "zh": "简体中文"}
_PAGE = re.compile(rf"/(?:live/)?({'|'.join(LANGUAGES)})/")

_WORDS: dict[str, tuple[str, str]] = {
    "page.subtitle": ("Fine-tune a language model on this machine", "在这台机器上微调语言模型"),
    "tab.train": ("Train", "训练"),
    "tab.runs": ("Runs", "任务"),
    "tab.chat": ("Chat", "对话"),
    "tab.device": ("Device", "设备"),
    "device.wait": ("Examining this machine …", "正在检查这台机器……"),
    "device.again": ("Examine again", "重新检查"),
    "device.works": ("Training works here", "可以在这里训练"),
    "device.fails": ("Training would not work here", "目前无法在这里训练"),
    "chat.with": ("Talk with", "对话对象"),
    "chat.with.help": (
        "A run's adapter, or a base as it is. Or type a hub id, or a model's or adapter's folder.",
        "某个任务的适配器，或未经微调的基座。也可输入 Hub 模型名、模型或适配器的文件夹。",
    ),
    "chat.base": ("embedded model, no adapter", "自带模型（无适配器）"),
    "chat.alone": ("{name}, no adapter", "{name}（无适配器）"),
    "chat.side": ("Base and adapter side by side", "并排对比基座与适配器"),
    "chat.base.title": ("Base", "基座模型"),
    "chat.adapter.title": ("Adapter", "适配器"),
    "chat.placeholder": ("Ask something …", "问点什么……"),
    "chat.send": ("Send", "发送"),
    "chat.stop": ("Stop", "停止"),
    "chat.again": ("Again", "重新回答"),
    "chat.undo": ("Undo", "撤销"),
    "chat.clear": ("Clear", "清空"),
    "chat.download": ("Transcript", "下载对话记录"),
    "chat.settings": ("How it answers", "回答方式"),
    "chat.system": ("System message", "系统提示"),
    "chat.examples": ("Few-shot examples", "少样本示例"),
    "chat.examples.help": (
        'One a line: {"instruction": "…", "output": "…"}',
        '每行一条：{"instruction": "…", "output": "…"}',
    ),
    "chat.max_new_tokens": ("Longest answer (tokens)", "最长回答（词元）"),
    "chat.temperature": ("Temperature (0: greedy)", "温度（0 为贪心）"),
    "chat.top_k": ("Top-k", "Top-k"),
    "chat.top_p": ("Top-p", "Top-p"),
    "chat.repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "chat.seed": ("Seed (empty: none)", "随机种子（空：不固定）"),
    "chat.speed": ("{tokens} tokens, {speed} tokens/s", "{tokens} 个词元，{speed} 词元/秒"),
    "chat.loading": ("Loading the model …", "正在加载模型……"),
    "train.recipe": ("Start from", "从这里开始"),
    "train.recipe.help": (
        "A recipe that comes along; every field below can be changed.",
        "选择一个自带的配方，下面的每一项都可以修改。",
    ),
    "train.recipe.upload": ("A recipe file of your own …", "上传自己的配方文件……"),
    "train.upload": ("Your rows", "你的数据"),
    "train.more": ("All settings", "全部设置"),
    "train.look": ("Look at the rows", "查看数据"),
    "train.check": ("What will happen?", "预览结果"),
    "train.start": ("Start", "开始训练"),
    "train.started": ("Started: {name}", "已启动：{name}"),
    "train.mistakes": ("Please mend the marked fields.", "请修改标出的字段。"),
    "train.queued": (
        "{name} waits its turn: another run is training.",
        "{name} 正在排队：另一个任务正在训练。",
    ),
    "train.copied": ("The form has the settings of {name}.", "表单已填入 {name} 的设置。"),
    "train.same": ("The same as a command and as a recipe", "等价的命令与配方"),
    "train.command": ("Command", "命令"),
    "train.yaml": ("Recipe", "配方"),
    "rows.read": (
        "{kept} of {read} rows can be used ({layout}, {encoding})",
        "共 {read} 条，可用 {kept} 条（{layout}，{encoding}）",
    ),
    "rows.dropped": (
        "left out: {count}, {reason} ({where})",
        "略过 {count} 条：{reason}（{where}）",
    ),
    "rows.duplicates": ("{count} duplicates", "重复 {count} 条"),
    "rows.tokens": (
        "{tokens} tokens, {supervised} of them learnt; {each} tokens a character",
        "共 {tokens} 个词元，其中学习 {supervised} 个；每个字符 {each} 个词元",
    ),
    "rows.lengths": (
        "a row in tokens: half up to {p50}, 90 % up to {p90}, 99 % up to {p99}, longest {max}",
        "每条的词元数：一半不超过 {p50}，90 % 不超过 {p90}，99 % 不超过 {p99}，最长 {max}",
    ),
    "rows.truncated": ("{count} rows are cut at {at} tokens", "{count} 条在 {at} 个词元处被截断"),
    "rows.preview": (
        "Rows as the model reads them; what it learns is marked.",
        "模型看到的数据；标出的部分是要学习的内容。",
    ),
    "plan.rows": (
        "{rows} rows to learn, {heldout} held out",
        "{rows} 条用于学习，{heldout} 条留出",
    ),
    "plan.tokens": (
        "{tokens} tokens in {steps} steps at most",
        "最多 {steps} 步，共 {tokens} 个词元",
    ),
    "plan.time": ("about {time} (predicted)", "约需 {time}（预测）"),
    "plan.memory": ("{peak} of {free} GiB (predicted)", "{peak} / {free} GiB（预测）"),
    "plan.fits": ("fits", "放得下"),
    "plan.tight": ("tight", "勉强放得下"),
    "plan.no": ("won't fit", "放不下"),
    "plan.would": ("Would fit with: {settings}", "改成以下设置可以放下：{settings}"),
    "state.queued": ("waiting its turn", "排队中"),
    "state.running": ("running", "运行中"),
    "state.stopping": ("stopping", "正在停止"),
    "state.stopped": ("stopped", "已停止"),
    "state.finished": ("finished", "已完成"),
    "state.failed": ("failed", "失败"),
    "state.damaged": ("damaged", "已损坏"),
    "runs.none": (
        "No runs yet. Start one on the Train page; it appears here.",
        "还没有训练任务。在“训练”页启动后会显示在这里。",
    ),
    "runs.step": ("step {step} of {total}", "第 {step} 步，共 {total} 步"),
    "runs.step_open": ("step {step}", "第 {step} 步"),
    "runs.left": ("{time} left", "剩余 {time}"),
    "runs.cooling": ("paused until it has cooled", "已暂停，等待降温"),
    "runs.preparing": ("preparing: {phase}", "准备中：{phase}"),
    "runs.download": ("{done} of {total} MB", "已下载 {done} / {total} MB"),
    "runs.compare": ("draw beside the chosen one", "与所选任务画在同一张图里"),
    "do.stop": ("Stop", "停止"),
    "do.stop.help": (
        "Writes a checkpoint and ends; Resume goes on from there.",
        "保存检查点后结束，之后可以继续。",
    ),
    "do.resume": ("Resume", "继续"),
    "do.delete": ("Delete", "删除"),
    "do.delete.sure": (
        "Delete {name} with its checkpoints and adapter? This can't be undone.",
        "确定删除 {name} 及其检查点和适配器吗？此操作无法撤销。",
    ),
    "do.copy": ("Use again", "再用一次"),
    "do.copy.help": (
        "Puts this run's settings into the form.",
        "把此任务的设置填入训练表单。",
    ),
    "about": ("Name and notes", "名称与备注"),
    "about.title": ("Name", "名称"),
    "about.notes": ("Notes", "备注"),
    "about.save": ("Save", "保存"),
    "do.adapter": ("Adapter (zip)", "适配器（zip）"),
    "do.report": ("Report", "报告"),
    "chart.loss": ("Loss (nats per token)", "损失（每词元 nat）"),
    "chart.loss.train": ("training", "训练"),
    "chart.loss.heldout": ("held-out", "留出数据"),
    "chart.lr": ("Learning rate", "学习率"),
    "chart.grad_norm": ("Gradient norm", "梯度范数"),
    "chart.tokens_per_second": ("Tokens per second", "每秒词元数"),
    "chart.memory": ("Peak memory (GiB)", "峰值内存（GiB）"),
    "chart.watts": ("Power (W)", "功率（W）"),
    "chart.temperature": ("Temperature (°C)", "温度（°C）"),
    "chart.waiting": ("Curves appear after the first step.", "完成第一步后显示曲线。"),
    "figure.loss": ("loss", "损失"),
    "figure.heldout": ("held-out loss", "留出损失"),
    "figure.speed": ("tokens/s", "词元/秒"),
    "figure.memory": ("peak memory", "峰值内存"),
    "log": ("Log", "日志"),
    "error.where": ("where: {where}", "位置：{where}"),
    "error.fix": ("fix: {fix}", "办法：{fix}"),
}


_ASIDE = ("where", "fix")


class Words:
    """What the page says in one language."""

    def __init__(self, language: str) -> None:
        self.language = language if language in LANGUAGES else "en"
        self._column = list(LANGUAGES).index(self.language)

    def __call__(self, key: str, **values: object) -> str:
        """The text of a key; where values are given, with them in its braces."""
        text = _WORDS[key][self._column]
        return text.format(**values) if values else text

    def help(self, key: str) -> str:
        """A recipe key's one line of help."""
        return HELP[key] if self.language == "zh" else recipe.keys()[key]

    def said(self, text: str) -> str:
        """What the program says (a sentence of an error, why a run ended), in this language."""
        return translate.chinese(text) if self.language == "zh" else text

    def phase(self, name: str) -> str:
        """What a run is doing, by the name that its events give it."""
        return translate.chinese_phase(name) if self.language == "zh" else name

    def error(self, error: UserError) -> dict[str, str]:
        """An error's parts."""
        return {name: self.said(text) for name, text in error.as_json().items()}

    def error_text(self, error: UserError) -> str:
        """An error as lines of text."""
        told = self.error(error)
        parts = [told["what"], *(self(f"error.{p}", **{p: told[p]}) for p in _ASIDE if told[p])]
        return "\n".join(parts)

    def duration(self, seconds: float) -> str:
        """`4 min 05 s`, `1 h 02 min`; `4 分 05 秒`, `1 小时 02 分`."""
        text = report.duration(seconds)
        if self.language == "en":
            return text
        return text.replace("min", "分").replace("h", "小时").replace("s", "秒")


def preferred(accept_language: str) -> str:
    """The language a browser asks for (`Accept-Language`, RFC 9110): ours that it wants most."""
    wanted: list[tuple[float, int, str]] = []
    for place, part in enumerate(accept_language.split(",")):
        name, _, quality = part.partition(";q=")
        try:
            wanted.append((-float(quality or 1), place, name.strip().lower()[:2]))
        except ValueError:
            continue
    return next((name for _, _, name in sorted(wanted) if name in LANGUAGES), "en")


def asked(path: str, headers: Mapping[str, str]) -> str:
    """The language to answer a request in: that of the page it comes from, or the chosen one."""
    before = headers.get("referer", "").partition("://")[2].partition("/")[2]
    for address in (path, f"/{before}"):
        if page := _PAGE.match(address):
            return page[1]
    chosen = cookie_parser(headers.get("cookie", "")).get("jetson-ft-language", "")
    return chosen if chosen in LANGUAGES else preferred(headers.get("accept-language", ""))
