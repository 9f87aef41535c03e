/* GPT-2's blocks for one new token on a CPU, and x W^T for 1 to 8 rows; see native.py.
 *
 * A step reads every weight once. So each thread takes a part of every matrix's rows, which it reads
 * from front to back, and repeats what is small (layer norms, the input's rounding) instead of
 * waiting for another thread. The threads wait five times in a layer.
 *
 * The compiler may add in any order (-ffast-math), so that it can use vector instructions.
 * C n_embd, H heads, D = C / H, K inputs, N outputs, M rows.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* float32: weight (N, K). int8: q (N, K) with scale and sums (N), as in prepacked.py. */
typedef struct {
    const void *weight;
    const float *bias, *scale, *sums;
} Matrix;

typedef struct {
    const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;
    Matrix c_attn, attn_c_proj, c_fc, mlp_c_proj;
} Layer;

typedef struct {
    long n_layer, n_embd, n_head, length; /* length: positions that fit into the cache */
    float epsilon;
    int middle; /* of int8's inputs, 128 or 64; 0 is float32 */
} Shape;

static float dot(const float *w, const float *x, long K) {
    float sum = 0;
    for (long k = 0; k < K; k++) sum += w[k] * x[k];
    return sum;
}

static int32_t dot_bytes(const int8_t *q, const int16_t *u, long K) {
    int32_t sum = 0;
    for (long k = 0; k < K; k++) sum += (int32_t)q[k] * u[k];
    return sum;
}

static void layer_norm(float *y, const float *x, const float *weight, const float *bias, long C,
                       float epsilon) {
    float mean = 0, variance = 0;
    for (long c = 0; c < C; c++) mean += x[c] / C;
    for (long c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
    float scale = 1 / sqrtf(variance + epsilon);
    for (long c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

/* u - m, d and low + m d of prepacked.py: x (K) -> u (K). NaN makes d NaN. */
static void narrow(int16_t *u, float *d, float *low, const float *x, long K, int middle) {
    float least = x[0], most = x[0];
    int has_nan = 0;
    for (long k = 0; k < K; k++) {
        least = x[k] < least ? x[k] : least;
        most = x[k] > most ? x[k] : most;
        has_nan |= x[k] != x[k];
    }
    float range = most - least, steps = 255.0f / (range + 1e-8f);
    int shift = middle == 64;
    for (long k = 0; k < K; k++)
        u[k] = (int16_t)(((int32_t)lrintf((x[k] - least) * steps) >> shift) - middle);
    *d = has_nan ? NAN : range / 255.0f;
    /* two steps merge into one, whose middle lies half a step above the lower one */
    least += shift * *d / 2;
    *d *= 1 + shift;
    *low = least + middle * *d;
}

enum { STORE, GELU, ADD };

/* A thread's part of y (N): W x + bias stored, through GELU, or added to y. u: room for K. */
static void product(float *y, const Matrix *m, const float *x, int16_t *u, long N, long K, int then,
                    int middle) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    float d = 0, low = 0;
    if (middle) narrow(u, &d, &low, x, K, middle);
    for (long n = N * thread / threads; n < N * (thread + 1) / threads; n++) {
        float z;
        if (middle)
            z = d * ((float)dot_bytes((const int8_t *)m->weight + n * K, u, K) * m->scale[n]) +
                (m->bias[n] + low * m->sums[n]);
        else
            z = dot((const float *)m->weight + n * K, x, K) + m->bias[n];
        /* 0.5 (1 + tanh(t)) = 1 / (1 + exp(-2 t)) */
        if (then == GELU) z /= 1 + expf(-1.5957691216f * (z + 0.044715f * z * z * z));
        y[n] = then == ADD ? y[n] + z : z;
    }
}

/* A thread's heads of y (C): attention of qkv (3 C) to the cache (2, H, length, D), whose position
 * `past` it writes. p: room for past + 1. */
static void attention(float *y, const float *qkv, float *cache, float *p, const Shape *s,
                      long past) {
    long C = s->n_embd, H = s->n_head, D = C / H;
    for (long h = omp_get_thread_num(); h < H; h += omp_get_num_threads()) {
        float *k = cache + h * s->length * D, *v = k + H * s->length * D;
        const float *q = qkv + h * D;
        float most = -INFINITY, sum = 0;
        memcpy(k + past * D, q + C, D * sizeof(float));
        memcpy(v + past * D, q + 2 * C, D * sizeof(float));
        for (long t = 0; t <= past; t++) {
            p[t] = dot(k + t * D, q, D) / sqrtf(D);
            most = p[t] > most ? p[t] : most;
        }
        for (long t = 0; t <= past; t++) sum += p[t] = expf(p[t] - most);
        memset(y + h * D, 0, D * sizeof(float));
        for (long t = 0; t <= past; t++)
            for (long i = 0; i < D; i++) y[h * D + i] += p[t] / sum * v[t * D + i];
    }
}

/* x (C), the embedding of one token, becomes the last block's output. cache: (n_layer, 2, H, length,
 * D), filled up to `past`, which this token fills. scratch: 8 C. */
void blocks(float *x, const Layer *layers, const Shape *s, float *cache, long past,
            float *scratch) {
    long C = s->n_embd;
    float *qkv = scratch, *y = qkv + 3 * C, *f = y + C;
#pragma omp parallel
    {
        float normal[C], p[past + 1];
        int16_t u[4 * C];
        for (long l = 0; l < s->n_layer; l++) {
            const Layer *a = layers + l;
            layer_norm(normal, x, a->ln_1_weight, a->ln_1_bias, C, s->epsilon);
            product(qkv, &a->c_attn, normal, u, 3 * C, C, STORE, s->middle);
#pragma omp barrier
            attention(y, qkv, cache + 2 * l * C * s->length, p, s, past);
#pragma omp barrier
            product(x, &a->attn_c_proj, y, u, C, C, ADD, s->middle);
#pragma omp barrier
            layer_norm(normal, x, a->ln_2_weight, a->ln_2_bias, C, s->epsilon);
            product(f, &a->c_fc, normal, u, 4 * C, C, GELU, s->middle);
#pragma omp barrier
            product(x, &a->mlp_c_proj, f, u, C, 4 * C, ADD, s->middle);
#pragma omp barrier
        }
    }
}

/* A row of W is read once and multiplied by all rows of x, which stay in a cache. */
#define EACH(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8)
#define BYTE_ROWS(M)                                                                              \
    static void byte_rows_##M(float *y, const int16_t *u, const int8_t *q, const float *scale,    \
                              long N, long K) {                                                   \
        _Pragma("omp parallel for schedule(static)") for (long n = 0; n < N; n++) {               \
            int32_t sum[M] = {0};                                                                 \
            for (long k = 0; k < K; k++)                                                          \
                for (int m = 0; m < M; m++) sum[m] += (int32_t)q[n * K + k] * u[m * K + k];       \
            for (int m = 0; m < M; m++) y[m * N + n] = (float)sum[m] * scale[n];                  \
        }                                                                                         \
    }
EACH(BYTE_ROWS)

#define CASE(M)                                                                                   \
    case M: byte_rows_##M(y, u, q, scale, N, K); break;

/* y (M, N) = u (M, K) (scale q)^T, q (N, K), for 1 to 8 rows. The sums are exact. */
void byte_linear(float *y, const int16_t *u, const int8_t *q, const float *scale, long M, long N,
                 long K) {
    switch (M) { EACH(CASE) }
}
