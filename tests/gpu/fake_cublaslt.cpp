// A libcublasLt for tests: the functions that npllm.backends.cupy_gpu.cublaslt calls, with the prototypes of cublasLt.h, on
// memory of the host. It looks at all that it is given, and fails with INVALID_VALUE (7) where something is amiss.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {
struct Layout { int type; uint64_t rows, columns; int64_t step; };
struct Operation { int compute, scale, left = 0, right = 0; };
struct Preference { uint64_t workspace = 0; uint32_t alignment[4] = {256, 256, 256, 256}; };
struct Algorithm { uint64_t data[8]; };
struct Heuristic { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };
int handle, live = 0, calls = 0;
constexpr uint64_t CHOSEN = 0x5eed;
enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68 };

float number(const void *at, int type, size_t i) {
    if (type == R_32F) return ((const float *)at)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
}  // namespace

extern "C" {
int fake_live() { return live; }
int fake_calls() { return calls; }
const char *cublasLtGetStatusName(int status) { return status == INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS"; }
int cublasLtCreate(void **made) { *made = &handle; return SUCCESS; }
int cublasLtMatmulDescCreate(Operation **made, int compute, int scale) { live++; *made = new Operation{compute, scale}; return SUCCESS; }
int cublasLtMatmulDescDestroy(Operation *it) { live--; delete it; return SUCCESS; }
int cublasLtMatmulDescSetAttribute(Operation *it, int attribute, const void *value, size_t size) {
    if (size != 4 || attribute < 3 || attribute > 4) return INVALID_VALUE;
    memcpy(attribute == 3 ? &it->left : &it->right, value, 4);
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(Layout **made, int type, uint64_t rows, uint64_t columns, int64_t step) {
    if (step < (int64_t)rows) return INVALID_VALUE;
    live++;
    *made = new Layout{type, rows, columns, step};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout *it) { live--; delete it; return SUCCESS; }
int cublasLtMatmulPreferenceCreate(Preference **made) { live++; *made = new Preference; return SUCCESS; }
int cublasLtMatmulPreferenceDestroy(Preference *it) { live--; delete it; return SUCCESS; }
int cublasLtMatmulPreferenceSetAttribute(Preference *it, int attribute, const void *value, size_t size) {
    if (attribute == 1 && size == 8) memcpy(&it->workspace, value, 8);
    else if (attribute >= 5 && attribute <= 8 && size == 4) memcpy(&it->alignment[attribute - 5], value, 4);
    else return INVALID_VALUE;
    return SUCCESS;
}
// As the library does, it has no kernel for bf16 that lies at odd multiples of 8 bytes or less.
int cublasLtMatmulAlgoGetHeuristic(
    void *by, Operation *it, Layout *a, Layout *b, Layout *c, Layout *d, Preference *preference, int asked, Heuristic *found, int *count) {
    if (by != &handle || asked != 1 || it->compute != COMPUTE_32F || it->scale != R_32F || a->type != b->type || c->type != R_32F ||
        d->type != R_32F || a->rows != b->rows || c->rows != a->columns || c->columns != b->columns || it->left != 1 || it->right)
        return INVALID_VALUE;
    *count = 0;
    bool odd = a->step % 8 || b->step % 8;
    for (uint32_t each : preference->alignment) odd = odd || each < 16;
    if (a->type == R_16BF && odd) return NOT_SUPPORTED;
    found->algorithm.data[0] = CHOSEN;
    found->workspace = 1 << 20;
    found->state = preference->workspace < found->workspace ? NOT_SUPPORTED : SUCCESS;
    *count = 1;
    return SUCCESS;
}
int cublasLtMatmul(
    void *by, Operation *, const float *alpha, const void *a, Layout *a_is, const void *b, Layout *b_is, const float *beta,
    const float *c, Layout *c_is, float *d, Layout *d_is, const Algorithm *algorithm, void *workspace, size_t size, void *stream) {
    if (by != &handle || algorithm->data[0] != CHOSEN || size < 1 << 20 || !workspace || stream) return INVALID_VALUE;
    calls++;
    for (uint64_t n = 0; n < d_is->columns; n++)
        for (uint64_t m = 0; m < d_is->rows; m++) {
            double sum = 0;
            for (uint64_t k = 0; k < a_is->rows; k++)
                sum += (double)number(a, a_is->type, m * a_is->step + k) * number(b, b_is->type, n * b_is->step + k);
            float before = *beta ? *beta * c[n * c_is->step + m] : 0.0f;
            d[n * d_is->step + m] = (float)(*alpha * sum) + before;
        }
    return SUCCESS;
}
}
