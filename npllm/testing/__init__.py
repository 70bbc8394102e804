"""The verification kit: an oracle with an error budget for the hot operations of LLMs.

    from npllm.testing import Rounding, cases, check

    @pytest.mark.parametrize("case", cases("attention", tags="decode"), ids=str)
    def test_my_kernel(case):
        check("attention", my_kernel, case, policy=Rounding("bf16")).raise_on_failure()

Importing it needs neither pytest nor any array library but NumPy. README.md in this folder tells how it decides.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npllm.testing.auditing import Audit, audit
    from npllm.testing.case import Case, cases
    from npllm.testing.checking import check
    from npllm.testing.divergence.finder import Divergence, diff
    from npllm.testing.operation import Operation, operations
    from npllm.testing.report import CheckError, Report, Suite
    from npllm.testing.rounding import Rounding

__all__ = [
    "Audit", "Case", "CheckError", "Divergence", "Operation", "Report", "Rounding", "Suite", "audit", "cases", "check",
    "diff", "operations",
]  # fmt: skip

# No module is called like a name of `__all__`: importing it would put the module in the name's place.
PLACES = {
    "Audit": "auditing", "Case": "case", "CheckError": "report", "Divergence": "divergence.finder", "Operation": "operation",
    "Report": "report", "Rounding": "rounding", "Suite": "report", "audit": "auditing", "cases": "case", "check": "checking",
    "diff": "divergence.finder", "operations": "operation",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'npllm.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"npllm.testing.{PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
