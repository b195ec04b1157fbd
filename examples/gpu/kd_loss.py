"""Benchmark the distillation loss on a GPU: correctness against float64, time and peak memory against alternatives.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/kd_loss.py [WORD ...]

With words, only the sections that have one of them in their names run.
"""

from __future__ import annotations

import gc
import statistics

import torch
import torch.nn.functional as F
from sections import Sections
from transformers import LlamaConfig, LlamaForCausalLM

from hf_optim.toolkit.distillation import losses as toolkit_losses
from hf_optim.toolkit.distillation import teachers
from hf_optim_kernels.common import benchmark
from hf_optim_kernels.common import launch as common_launch
from hf_optim_kernels.kd_loss import launch, linear, naive, op

T, BETA = 2.0, 0.5
GB = 1e9
section = Sections("kd.json")


def import_liger():
    import liger_kernel.transformers

    return liger_kernel.transformers


def random_logits(rows, V, seed, dtype=torch.bfloat16, scale=3.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(rows, V, device="cuda", generator=generator) * scale).to(dtype)


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@section("correctness")
def _():
    """Compare loss and gradient with the specification in float64."""
    verdicts = []
    for V in (3, 1000, 32000, 50257, 128256):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for direction in naive.DIRECTIONS:
                for overwrite in (False, True):
                    s, t = random_logits(37, V, 0, dtype), random_logits(37, V, 1, dtype)
                    rows = torch.arange(0, 37, 2, device="cuda")
                    exact = naive.losses(s.double(), t.double(), None, T, direction, BETA)[rows].mean()
                    kept = torch.zeros(37, dtype=torch.bool, device="cuda")
                    kept[rows] = True
                    # Training in float16 uses a loss scale: without it, small probabilities underflow.
                    factor = 2.0**12 if dtype == torch.float16 else 1.0
                    up = torch.full((37,), factor / len(rows), dtype=torch.float64, device="cuda")
                    grad = naive.gradient(s.double(), t.double(), kept, up, T, direction, BETA)
                    leaf = s.clone().requires_grad_()
                    loss = op.kd_loss(leaf, t, temperature=T, direction=direction, beta=BETA, rows=rows,
                                      overwrite_teacher=overwrite)  # fmt: skip
                    (loss * factor).backward()
                    bound = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]
                    loss_error, gradient_error = abs(float(loss) / float(exact) - 1), relative_error(leaf.grad, grad)
                    good = loss_error < 1e-5 and gradient_error < bound
                    verdicts.append(good)
                    if not good or V == 128256:
                        print(f"V={V} {dtype} {direction} overwrite={overwrite}: loss {loss_error:.1e} "
                              f"gradient {gradient_error:.1e} {'ok' if good else 'WRONG'}")  # fmt: skip
    s = random_logits(16, 32000, 0, torch.float32)
    t = random_logits(16, 32000, 1, torch.float32)
    s[:, 31900:] = t[:, 31900:] = -torch.inf
    leaf = s.requires_grad_()
    for direction in naive.DIRECTIONS:
        loss = op.kd_loss(leaf, t, temperature=T, direction=direction, beta=BETA)
        (g,) = torch.autograd.grad(loss, leaf)
        exact = naive.losses(s.detach().double()[:, :31900], t.double()[:, :31900], None, T, direction, BETA).mean()
        good = (
            abs(float(loss) / float(exact) - 1) < 1e-5
            and bool(torch.isfinite(g).all())
            and float(g[:, 31900:].abs().max()) == 0
        )
        print("-inf", direction, good)
        verdicts.append(good)
    compiled = torch.compile(lambda a, b: op.kd_loss(a, b, temperature=T), fullgraph=True)
    a, b = random_logits(64, 5000, 2), random_logits(64, 5000, 3)
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    compiled(x, b).backward()
    op.kd_loss(y, b, temperature=T).backward()
    equal = torch.equal(x.grad, y.grad)
    print("compiled equals eager:", equal)
    verdicts.append(equal)
    return {"cases": len(verdicts), "right": sum(verdicts)}


def peak_bytes(call):
    """Return the peak memory of a call in bytes, above the memory that was allocated before it."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def median_ms(calls, repeats=15):
    """Return the median milliseconds of each call; the calls take turns, so that clock drift affects all alike."""
    times = [[] for _ in calls]
    for turn in range(repeats + 2):
        for call, taken in zip(calls, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            # The first two turns fill the caches of memory and of compiled code.
            if turn > 1:
                taken.append(start.elapsed_time(end))
    return [statistics.median(taken) for taken in times]


def compare(contenders, floor_bytes, bandwidth, exact=None):
    """Print and return time, peak memory and error of each contender.

    The lower bound of the time is that of moving ``floor_bytes`` at the measured bandwidth.
    """
    floor = floor_bytes / bandwidth / 1e3
    rows = {}
    for name, call in contenders.items():
        try:
            output = call()
            error = None if exact is None or output is None else relative_error(output[: len(exact)], exact)
            del output
            rows[name] = {"peak_gb": peak_bytes(call) / GB, "error": error}
        except Exception as failure:
            print(f"{name:34s} failed: {type(failure).__name__}: {str(failure)[:150]}", flush=True)
            rows[name] = {"failed": str(failure)[:300]}
        gc.collect()
        torch.cuda.empty_cache()
    working = [name for name, row in rows.items() if "failed" not in row]
    print(f"{'':34s} {'ms':>8s} {'GB/s':>7s} {'of floor':>8s} {'peak GB':>8s} {'error':>8s}   floor {floor:.3f} ms")
    for name, ms in zip(working, median_ms([contenders[name] for name in working]), strict=True):
        row = rows[name]
        row |= {"ms": ms, "gb_s": floor_bytes / ms / 1e6, "of_floor": floor / ms}
        shown = "" if row["error"] is None else f"{row['error']:8.1e}"
        print(f"{name:34s} {ms:8.3f} {row['gb_s']:7.0f} {floor / ms:8.0%} {row['peak_gb']:8.3f} {shown}", flush=True)
    return {"floor_ms": floor, "rows": rows}


def plain_loss(student, teacher, upcast=True):
    """The formula in PyTorch, with the mean over rows."""
    s, t = (student.float(), teacher.float()) if upcast else (student, teacher)
    log_q, log_p = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    return T**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


BANDWIDTH = section.result["bandwidth"] = benchmark.copy_bandwidth()


def compare_on_logits(rows, V, direction):
    s, t = random_logits(rows, V, 0).requires_grad_(), random_logits(rows, V, 1)
    spare = t.clone()
    few = 64
    up = torch.full((few,), 1 / rows, dtype=torch.float64, device="cuda")
    exact = naive.gradient(s[:few].detach().double(), t[:few].double(), None, up, T, direction, BETA)

    def backward(loss):
        return torch.autograd.grad(loss, s)[0]

    options = {"temperature": T, "direction": direction, "beta": BETA}
    contenders = {}
    if direction == "forward":
        compiled = torch.compile(plain_loss)
        contenders |= {
            "plain formula, float32": lambda: backward(plain_loss(s, t)),
            "plain formula, bfloat16": lambda: backward(plain_loss(s, t, False)),
            "plain formula, torch.compile": lambda: backward(compiled(s, t)),
        }
    contenders |= {
        "toolkit, chunks of torch": lambda: backward(toolkit_losses.kd_loss(s, t, **options)),
        "ours": lambda: backward(op.kd_loss(s, t, **options)),
    }
    try:
        liger = import_liger()
        if direction == "forward":
            kl = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
            contenders["liger KLDIV (log_softmax float32)"] = lambda: backward(
                T**2 * kl(F.log_softmax(s.float() / T, -1), F.log_softmax(t.float() / T, -1))
            )
            contenders["liger KLDIV (log_softmax bfloat16)"] = lambda: backward(
                T**2 * kl(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1))
            )
        jsd = liger.LigerJSD(beta={"forward": 0.0, "reverse": 1.0, "js": BETA}[direction])
        contenders["liger JSD (log_softmax float32)"] = lambda: backward(
            T**2 * jsd(F.log_softmax(s.float() / T, -1), F.log_softmax(t.float() / T, -1))
        )
    except ImportError as error:
        print(f"liger-kernel is left out: {error}", flush=True)

    def overwriting():
        return backward(op.kd_loss(s, spare, overwrite_teacher=True, **options))

    # Without an error, since the first call replaces its teacher by the gradient.
    contenders["ours, in the teacher's memory"] = lambda: (overwriting(), None)[1]
    return compare(contenders, 3 * rows * V * 2, BANDWIDTH, exact)


for rows, V in ((8192, 32000), (4096, 128256)):
    for direction in naive.DIRECTIONS:
        section(f"logits {rows}x{V} {direction}")(
            lambda rows=rows, V=V, direction=direction: compare_on_logits(rows, V, direction)
        )


def compare_with_heads(rows, V, H, H_t):
    h = random_logits(rows, H, 0, scale=1.0).requires_grad_()
    w = random_logits(V, H, 1, scale=H**-0.5 * 2).requires_grad_()
    h_t, w_t = random_logits(rows, H_t, 2, scale=1.0), random_logits(V, H_t, 3, scale=H_t**-0.5 * 2)
    few = 64

    def backward(loss):
        return torch.autograd.grad(loss, (h, w))[0]

    with torch.no_grad():
        z, z_t = h[:few].double() @ w.double().T, h_t[:few].double() @ w_t.double().T
        up = torch.full((few,), 1 / rows, dtype=torch.float64, device="cuda")
        exact = naive.gradient(z, z_t, None, up, T, "forward", BETA) @ w.double()
        del z, z_t
    options = {"temperature": T}

    def with_full_logits():
        with torch.no_grad():
            z_t = h_t @ w_t.T
        return backward(op.kd_loss(h @ w.T, z_t, overwrite_teacher=True, **options))

    contenders = {
        "plain formula, float32": lambda: backward(plain_loss(h @ w.T, h_t @ w_t.T)),
        "full logits, our loss": with_full_logits,
        "ours, fused with the heads": lambda: backward(linear.fused_linear_kd_loss(h, w, h_t, w_t, **options)),
    }
    for rows_at_once in (512, 1024, 2048, 4096):
        contenders[f"ours, fused, {rows_at_once} rows at once"] = lambda chunk=rows_at_once * V: backward(
            linear.fused_linear_kd_loss(h, w, h_t, w_t, chunk_elements=chunk, **options)
        )
    try:
        jsd = import_liger().LigerFusedLinearJSD(jsd_beta=0.0, temperature=T)
        contenders["liger FusedLinearJSD (beta 0)"] = lambda: backward(T**2 * jsd(h, w, h_t, w_t, None))
    except ImportError as error:
        print(f"liger-kernel is left out: {error}", flush=True)
    flops = 2 * rows * V * (3 * H + H_t)
    rate = benchmark.matmul_rate()
    print(f"matrix products alone, at the measured rate: {flops / rate / 1e3:.2f} ms")
    return {"products_ms": flops / rate / 1e3} | compare(contenders, 3 * rows * V * 2, BANDWIDTH, exact)


for rows, V, H, H_t in ((8192, 32000, 2048, 4096), (4096, 128256, 2048, 4096)):
    section(f"heads {rows}x{V} student {H} teacher {H_t}")(lambda sizes=(rows, V, H, H_t): compare_with_heads(*sizes))


@section("teacher in host memory")
def _():
    """Compare a Llama of 24 blocks as teacher in GPU memory with one that is copied from the host block by block."""
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
                         num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    with torch.device("cuda"):
        teacher = LlamaForCausalLM(config).bfloat16()
    ids = torch.randint(32000, (8, 1024), device="cuda")
    results = {}
    on_gpu = None
    for device in ("same", "offload"):
        if device == "offload":
            teacher = teacher.cpu()
        teacher = teachers.freeze(teacher, torch.device("cuda"), device)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        z = teachers.forward_logits(teacher, {"input_ids": ids})
        on_gpu = z.cpu() if on_gpu is None else on_gpu
        equal = torch.equal(on_gpu, z.cpu())
        del z
        (ms,) = median_ms([lambda: teachers.forward_logits(teacher, {"input_ids": ids})], 5)
        results[device] = {
            "ms": ms,
            "standing_gb": allocated / GB,
            "peak_gb": torch.cuda.max_memory_allocated() / GB,
            "equal": equal,
        }
        print(device, results[device])
    return results


@section("shapes of the kernel")
def _():
    """Time block sizes and numbers of warps, to choose the constants of ``kd_loss/launch.py``."""
    results = {}
    shipped = launch._block
    for rows, V in ((8192, 32000), (4096, 128256)):
        s, t = random_logits(rows, V, 0), random_logits(rows, V, 1)
        up = torch.full((rows,), 1 / rows, device="cuda")
        size = rows * V * 2
        for step, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8), (8192, 16), (16384, 16)):
            launch._block = lambda V, most, chosen=(step, warps): chosen
            common_launch._COMPILED.clear()
            try:
                _, stats = launch.losses(s, t, None, T, "forward", BETA)
                out = torch.empty_like(s)
                one = benchmark.eager_time([lambda: launch.losses(s, t, None, T, "forward", BETA)]).us
                two = benchmark.eager_time([lambda: launch.gradient(s, t, None, stats, up, out, T, "forward", BETA)]).us
                results[f"{rows}x{V} {step}/{warps}"] = (one, two)
                print(f"{rows}x{V} block {step} warps {warps}: loss {one:.0f} us ({2 * size / one / 1e3:.0f} GB/s), "
                      f"gradient {two:.0f} us ({3 * size / two / 1e3:.0f} GB/s)", flush=True)  # fmt: skip
            except Exception as failure:
                print(step, warps, type(failure).__name__, str(failure)[:100])
    launch._block = shipped
    common_launch._COMPILED.clear()
    return results
