"""Everything that the doctor says, in English and Simplified Chinese, each declared once.

A fix that is a command is the same in both.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """What was found, and what mends it."""

    found: tuple[str, str]
    fix: str | tuple[str, str] = ""


TITLES: dict[str, tuple[str, str]] = {
    "board": ("Board", "开发板"),
    "jetpack": ("JetPack", "JetPack"),
    "l4t": ("Known fault", "已知缺陷"),
    "power": ("Power mode", "功耗模式"),
    "clocks": ("GPU clock", "GPU 频率"),
    "access": ("Device files", "设备文件"),
    "memory": ("Memory", "内存"),
    "swap": ("Swap", "交换空间"),
    "disk": ("Disk", "磁盘"),
    "sensors": ("Sensors", "传感器"),
    "jtop": ("jtop", "jtop"),
    "hub": ("Hub", "模型站"),
    "torch": ("PyTorch", "PyTorch"),
    "gpu": ("GPU", "GPU"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
}

_FLASH = (
    "Flash JetPack 6.2: https://developer.nvidia.com/embedded/jetpack",
    "请刷写 JetPack 6.2：https://developer.nvidia.com/embedded/jetpack",
)
_WHOLE_RECIPES = (
    "Recipes without `quantize` work as they are.",
    "不使用 `quantize` 的配方不受影响。",
)
_BUILD = (
    "git clone --depth 1 --branch {version} "
    "https://github.com/bitsandbytes-foundation/bitsandbytes && cd bitsandbytes && "
    "cmake -DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=87 -S . && make -j4 && "
    "../.venv/bin/pip install --no-deps ."
)
_REINSTALL = "make clean && make setup"
_ROOM = (
    "Make room, or name another disk: `--set output=FOLDER` for runs, JETSON_FT_CACHE and "
    "HF_HOME for the rest.",
    "请清理空间或换一个磁盘：任务用 `--set output=文件夹`，其余用 JETSON_FT_CACHE 和 HF_HOME。",
)

FINDINGS: dict[str, Words] = {
    "board.jetson": Words(("{name}, {memory} GiB", "{name}，{memory} GiB")),
    "board.other": Words(
        ("no Jetson: {name}, {cores} cores", "不是 Jetson：{name}，{cores} 个核心")
    ),
    "jetpack.supported": Words(("{jetpack} (L4T {l4t})", "{jetpack}（L4T {l4t}）")),
    "jetpack.untried": Words(
        (
            "{jetpack} (L4T {l4t}): experimental, nobody has tried it yet; JetPack 6 is supported",
            "{jetpack}（L4T {l4t}）：实验性支持，尚未验证；正式支持的是 JetPack 6",
        ),
    ),
    "jetpack.old": Words(
        (
            "{jetpack} (L4T {l4t}) is not supported: its Python and CUDA are too old for PyTorch",
            "不支持 {jetpack}（L4T {l4t}）：其 Python 和 CUDA 对 PyTorch 来说太旧",
        ),
        _FLASH,
    ),
    "jetpack.unknown": Words(
        (
            "unknown: /etc/nv_tegra_release can't be read",
            "未知：无法读取 /etc/nv_tegra_release",
        ),
        (
            "In a container: docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro …",
            "在容器中：docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro …",
        ),
    ),
    "l4t.allocation": Words(
        (
            "L4T {l4t} refuses large allocations with enough memory free; 36.5 doesn't",
            "L4T {l4t} 在内存充足时也会拒绝大块分配；36.5 已修复",
        ),
        "sudo sed -i 's/r36\\.4/r36.5/' /etc/apt/sources.list.d/nvidia-l4t-apt-source.list && "
        "sudo apt update && sudo apt dist-upgrade",
    ),
    "power.fastest": Words(("{mode}, the fastest", "{mode}（最快）")),
    "power.slower": Words(
        ("{mode}; {best} is faster", "{mode}；{best} 更快"), "sudo nvpmodel -m {id}"
    ),
    "power.unknown": Words(
        ("unknown: nvpmodel's files can't be read", "未知：无法读取 nvpmodel 的文件"),
        "sudo nvpmodel -q",
    ),
    "clocks.fixed": Words(("fixed at {high} MHz", "固定在 {high} MHz")),
    "clocks.follow": Words(
        (
            "follows the load, {low} to {high} MHz; it can be fixed at the top",
            "随负载变化，{low} 至 {high} MHz；可固定在最高频率",
        ),
        "sudo jetson_clocks",
    ),
    "access.fine": Words(("the GPU's can be read", "可以读取 GPU 的设备文件")),
    "access.denied": Words(
        ("{node} can't be read: it is for the group {group}", "无法读取 {node}：它属于 {group} 组"),
        (
            "sudo usermod -aG video,render $USER, then log in again "
            "(in a container: docker run --group-add $(stat -c %g {node}) …)",
            "sudo usermod -aG video,render $USER，然后重新登录"
            "（在容器中：docker run --group-add $(stat -c %g {node}) …）",
        ),
    ),
    "access.missing": Words(
        ("{node} isn't there", "没有 {node}"),
        (
            "In a container: docker run --runtime nvidia …; else reinstall NVIDIA's drivers: "
            "sudo apt install --reinstall nvidia-l4t-core nvidia-l4t-cuda",
            "在容器中：docker run --runtime nvidia …；否则请重装 NVIDIA 驱动："
            "sudo apt install --reinstall nvidia-l4t-core nvidia-l4t-cuda",
        ),
    ),
    "memory.enough": Words(("{free} of {total} GiB free", "空闲 {free} / {total} GiB")),
    "memory.little": Words(
        (
            "{free} of {total} GiB free: enough for the embedded model at most",
            "空闲 {free} / {total} GiB：最多够自带的模型使用",
        ),
        ("Close other programs.", "请关闭其他程序。"),
    ),
    "memory.board": Words(
        (
            "{free} of {total} GiB free; without the desktop it is about 0.8 GB more",
            "空闲 {free} / {total} GiB；关闭桌面可多出约 0.8 GB",
        ),
        "sudo init 3",
    ),
    "memory.none": Words(
        (
            "{free} of {total} GiB free: nothing can be trained in that",
            "空闲 {free} / {total} GiB：不足以训练",
        ),
        ("Close other programs.", "请关闭其他程序。"),
    ),
    "swap.zram": Words(
        (
            "{size} GiB of zram, which takes of the memory that the GPU needs",
            "{size} GiB 的 zram，会占用 GPU 需要的内存",
        ),
        "sudo systemctl disable --now nvzramconfig",
    ),
    "swap.none": Words(
        (
            "none on a disk; other programs have nowhere to go when memory gets short",
            "磁盘上没有交换空间；内存紧张时其他程序无处可去",
        ),
        "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
        "sudo swapon /swapfile && echo '/swapfile none swap sw 0 0' | sudo tee -a /etc/fstab",
    ),
    "swap.disk": Words(("{size} GiB on a disk", "磁盘上有 {size} GiB")),
    "disk.enough": Words(("{free} GB free for {places}", "空闲 {free} GB，用于 {places}")),
    "disk.tight": Words(
        (
            "{free} GB free for {places}: enough for the embedded model, not for larger ones",
            "空闲 {free} GB，用于 {places}：够自带的模型使用，更大的模型放不下",
        ),
        _ROOM,
    ),
    "disk.full": Words(("{free} GB free for {places}", "空闲 {free} GB，用于 {places}"), _ROOM),
    "disk.closed": Words(
        ("{place} can't be written", "无法写入 {place}"), "sudo chown -R $USER {place}"
    ),
    "sensors.read": Words(("{source}: {said}", "{source}：{said}")),
    "sensors.memory": Words(
        (
            "memory alone ({source}); power and heat can't be measured here",
            "只有内存（{source}）；这里无法测量功耗和温度",
        ),
    ),
    "sensors.none": Words(
        (
            "neither power nor heat can be read; reports will have no energy",
            "无法读取功耗和温度；报告中不会有能耗",
        ),
        (
            "In a container: docker run -v /usr/bin/tegrastats:/usr/bin/tegrastats:ro …",
            "在容器中：docker run -v /usr/bin/tegrastats:/usr/bin/tegrastats:ro …",
        ),
    ),
    "jtop.silent": Words(
        (
            "its service doesn't answer this client (jetson-stats {version}); {source} is read "
            "instead",
            "其服务不响应本客户端（jetson-stats {version}）；改为读取 {source}",
        ),
        (
            "The service and .venv need the same version (jtop --version): "
            ".venv/bin/pip install jetson-stats==VERSION",
            "服务与 .venv 中的版本须一致（jtop --version）："
            ".venv/bin/pip install jetson-stats==版本",
        ),
    ),
    "hub.there": Words(("{address} answers", "{address} 可以访问")),
    "hub.away": Words(
        (
            "{address} doesn't answer; the embedded model, the bundled rows, local files and "
            "what was downloaded before work without",
            "{address} 无法访问；自带模型、自带数据、本地文件和已下载的内容不受影响",
        ),
        ("Name a mirror: export HF_ENDPOINT=https://…", "设置镜像：export HF_ENDPOINT=https://…"),
    ),
    "hub.told": Words(
        (
            "HF_HUB_OFFLINE is set: the embedded model, the bundled rows, local files and what "
            "was downloaded before work",
            "已设置 HF_HUB_OFFLINE：自带模型、自带数据、本地文件和已下载的内容可用",
        ),
        "unset HF_HUB_OFFLINE",
    ),
    "torch.cuda": Words(("{version}, built for CUDA {cuda}", "{version}，CUDA {cuda} 版")),
    "torch.cpu": Words(("{version}, for the processor", "{version}，处理器版")),
    "torch.cpu_with_gpu": Words(
        (
            "{version}, for the processor alone, but there is an NVIDIA GPU",
            "{version}，仅处理器版，但本机有 NVIDIA GPU",
        ),
        "make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130",
    ),
    "torch.cpu_on_board": Words(
        (
            "{version} is a build for the processor alone: the board's GPU can't be used",
            "{version} 是仅处理器版：无法使用开发板的 GPU",
        ),
        "make clean && make setup TORCH_INDEX=https://pypi.jetson-ai-lab.io/jp6/cu126/+simple/",
    ),
    "torch.broken": Words(
        ("can't be loaded: {error}", "无法加载：{error}"),
        ("sudo apt install libopenblas0, then " + _REINSTALL,
         "sudo apt install libopenblas0，然后 " + _REINSTALL),
    ),
    "gpu.none": Words(
        ("none with CUDA; training runs on the processor", "没有 CUDA GPU；在处理器上训练")
    ),
    "gpu.unusable": Words(
        ("can't be used: {error}", "无法使用：{error}"),
        (
            "See the lines on device files and JetPack above; then " + _REINSTALL,
            "请先看上面的设备文件和 JetPack 两行，然后 " + _REINSTALL,
        ),
    ),
    "gpu.right": Words(
        ("{name} ({sm}) computes right", "{name}（{sm}）计算正确"),
    ),
    "gpu.other_arch": Words(
        (
            "{name} ({sm}) computes right, though PyTorch was built for {built}",
            "{name}（{sm}）计算正确，但 PyTorch 是为 {built} 编译的",
        ),
    ),
    "gpu.kernels": Words(
        (
            "{name} ({sm}) can't run this PyTorch, built for {built}: {error}",
            "{name}（{sm}）无法运行为 {built} 编译的 PyTorch：{error}",
        ),
        _REINSTALL,
    ),
    "gpu.wrong": Words(
        (
            "{name} ({sm}) computes wrong: a product is off by {error}",
            "{name}（{sm}）计算错误：乘积偏差 {error}",
        ),
        _REINSTALL,
    ),
    "gpu.memory": Words(("{free} of {total} GiB free", "空闲 {free} / {total} GiB")),
    "bitsandbytes.right": Words(
        (
            "{version}: quantises and multiplies nf4 right ({device})",
            "{version}：nf4 量化与乘法正确（{device}）",
        ),
    ),
    "bitsandbytes.missing": Words(
        ("not installed: `quantize` can't be used", "未安装：无法使用 `quantize`"),
        _WHOLE_RECIPES,
    ),
    "bitsandbytes.broken": Words(
        (
            "{version} can't quantise here ({device}): {error}",
            "{version} 无法在此量化（{device}）：{error}",
        ),
        _WHOLE_RECIPES,
    ),
    "bitsandbytes.broken_on_board": Words(
        (
            "{version} has no kernels for this GPU: {error}",
            "{version} 没有适合此 GPU 的内核：{error}",
        ),
        (f"{_WHOLE_RECIPES[0]} For 4 bits: {_BUILD}", f"{_WHOLE_RECIPES[1]}如需 4 位：{_BUILD}"),
    ),
}  # fmt: skip
