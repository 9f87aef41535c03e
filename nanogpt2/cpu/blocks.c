/* GPT-2's blocks for one new token of each of 1 to 8 rows on a CPU, and x W^T for a few rows; at the
 * end, numbers of PyTorch's random stream.
 *
 * A step reads every weight once. So each thread takes a part of every matrix's outputs, whose
 * weights it reads from front to back, and repeats small work (layer norms, the input's rounding)
 * instead of waiting for another thread. The threads wait five times in a layer. Four outputs of all
 * rows are computed side by side: their sums stay in registers, and each number that is loaded is
 * used several times.
 *
 * The compiler may add in any order (-ffast-math), so that it can use vector instructions.
 * C n_embd, H heads, D = C / H, K inputs, N outputs, M rows. native.py holds the same structs.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined __F16C__ || defined __AVX2__
#include <immintrin.h>
#endif

enum { TILE = 4, MOST = 8 }; /* outputs side by side; rows */
enum { FLOAT, HALF, BYTES };
/* MOST_FLOATS, MOST_OTHERS: rows whose sums with four rows of W are fastest computed at once. */
#ifdef __AVX512F__
enum { LANES = 16, MOST_FLOATS = 8, MOST_OTHERS = 8 };
#else
enum { LANES = 8, MOST_FLOATS = 6, MOST_OTHERS = 4 };
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourInts __attribute__((vector_size(16), aligned(4), may_alias));

/* int8's inputs: u where an instruction multiplies bytes with a sign by bytes without, else u - m.
 * AT_ONCE: how many of them with_bytes() multiplies. */
#if defined __AVX512VNNI__
typedef uint8_t Input;
enum { KEEPS_MIDDLE = 1, AT_ONCE = 64 };
#elif defined __AVXVNNI__ && !defined __AVX512F__
typedef uint8_t Input;
enum { KEEPS_MIDDLE = 1, AT_ONCE = 32 };
#else
typedef int16_t Input;
enum { KEEPS_MIDDLE = 0, AT_ONCE = 2 * LANES };
#endif

/* weight (N, K): float32, float16 or int8, the latter with scale and sums (N), as in prepacked.py. */
typedef struct {
    const void *weight;
    const float *bias, *scale, *sums;
} Matrix;

typedef struct {
    const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;
    Matrix c_attn, attn_c_proj, c_fc, mlp_c_proj;
    float scale; /* of the queries, beside 1 / sqrt(D) */
} Layer;

typedef struct {
    long n_layer, n_embd, n_head, n_inner;
    float epsilon;
    int kind, middle; /* middle: of int8's inputs, 128 or 64 */
} Shape;

/* Each layer's keys and values. own (2, M, H, capacity, D), filled up to `past`, which the new token
 * fills. shared (2, M / rows, H, length, D), filled up to `common`: the positions before, which are
 * equal in `rows` neighbouring rows. mask (M, common + past + 1) is added to the scores; or null. */
typedef struct {
    float *const *own;
    const float *const *shared;
    const float *mask;
    long capacity, past, length, common, rows;
} Cache;

static inline float widened(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    float value = (float)rest * 0x1p-24f; /* of 0 and of numbers below the normal ones */
    if (rest >= 0x400) {
        /* the exponent's bias grows from 15 to 127; infinity and NaN keep the largest exponent */
        bits = (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23);
        memcpy(&value, &bits, sizeof value);
    }
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline Lanes half_lanes(const uint16_t *half) {
#if defined __AVX512F__
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)half));
#elif defined __F16C__
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)half));
#else
    Lanes wide;
    for (int i = 0; i < LANES; i++) wide[i] = widened(half[i]);
    return wide;
#endif
}

static inline float plain(float number) { return number; }
static inline int32_t whole(int8_t number) { return number; }
static inline Lanes lanes(const float *numbers) { return *(const Lanes *)numbers; }
static inline Four four(const float *numbers) { return *(const Four *)numbers; }

static inline Lanes with_floats(Lanes sum, const float *w, const float *x) {
    return sum + lanes(w) * lanes(x);
}

static inline Lanes with_halves(Lanes sum, const uint16_t *w, const float *x) {
    return sum + half_lanes(w) * lanes(x);
}

static inline Ints with_bytes(Ints sum, const int8_t *q, const Input *u) {
#if defined __AVX512VNNI__
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(u), _mm512_loadu_si512(q));
#elif defined __AVX512BW__
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)q));
    return sum + (Ints)_mm512_madd_epi16(wide, _mm512_loadu_si512(u));
#elif defined __AVXVNNI__
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_loadu_si256((const void *)u),
                                         _mm256_loadu_si256((const void *)q));
#elif defined __AVX2__ && !defined __AVX512F__
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)q));
    return sum + (Ints)_mm256_madd_epi16(wide, _mm256_loadu_si256((const void *)u));
#else
    for (int i = 0; i < AT_ONCE; i++) sum[i % LANES] += q[i] * u[i];
    return sum;
#endif
}

/* The total of each of four sums. */
#define TOTALS(NAME, VECTOR, FOUR)                                                                \
    static inline FOUR NAME(const VECTOR sums[TILE]) {                                            \
        FOUR parts[TILE][LANES / 4], t[TILE], total = {0};                                        \
        memcpy(parts, sums, sizeof parts);                                                        \
        for (int r = 0; r < TILE; r++) {                                                          \
            t[r] = parts[r][0];                                                                   \
            for (int i = 1; i < LANES / 4; i++) t[r] += parts[r][i];                              \
        }                                                                                         \
        for (int i = 0; i < 4; i++) total += (FOUR){t[0][i], t[1][i], t[2][i], t[3][i]};          \
        return total;                                                                             \
    }
TOTALS(totals, Lanes, Four)
TOTALS(whole_totals, Ints, FourInts)

/* z = the sums of four rows of W with M rows of x, which are `step` apart; two rows of W at a time
 * where M is above LARGEST. A row of W is short, so the processor does not fetch the next four by
 * itself. */
#define EACH(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8)
#define SUMS(NAME, M, LARGEST, WEIGHT, INPUT, VECTOR, FOUR, COUNT, WITH, TOTAL, ONE)              \
    static void NAME##_##M(FOUR *z, const WEIGHT *w, const INPUT *x, long K, long step) {         \
        enum { SIDE = (M) <= (LARGEST) ? TILE : TILE / 2 };                                       \
        VECTOR sum[M][TILE] = {{{0}}};                                                            \
        long even = K / COUNT * COUNT;                                                            \
        for (int first = 0; first < TILE; first += SIDE) {                                        \
            VECTOR side[M][SIDE] = {{{0}}};                                                       \
            for (long k = 0; k < even; k += COUNT)                                                \
                for (int r = 0; r < SIDE; r++) {                                                  \
                    const WEIGHT *at = w + (first + r) * K + k;                                   \
                    __builtin_prefetch(at + TILE * K);                                            \
                    for (int m = 0; m < M; m++)                                                   \
                        side[m][r] = WITH(side[m][r], at, x + m * step + k);                      \
                }                                                                                 \
            for (int m = 0; m < M; m++)                                                           \
                for (int r = 0; r < SIDE; r++) sum[m][first + r] = side[m][r];                    \
        }                                                                                         \
        for (int m = 0; m < M; m++) z[m] = TOTAL(sum[m]);                                         \
        for (long k = even; k < K; k++)                                                           \
            for (int r = 0; r < TILE; r++)                                                        \
                for (int m = 0; m < M; m++) z[m][r] += ONE(w[r * K + k]) * x[m * step + k];       \
    }
#define FLOATS(M)                                                                                 \
    SUMS(floats, M, MOST_FLOATS, float, float, Lanes, Four, LANES, with_floats, totals, plain)
#define HALVES(M)                                                                                 \
    SUMS(halves, M, MOST_OTHERS, uint16_t, float, Lanes, Four, LANES, with_halves, totals, widened)
#define BYTE_SUMS(M)                                                                              \
    SUMS(bytes, M, MOST_OTHERS, int8_t, Input, Ints, FourInts, AT_ONCE, with_bytes, whole_totals, \
         whole)
EACH(FLOATS)
EACH(HALVES)
EACH(BYTE_SUMS)

#define NAME_FLOATS(M) floats_##M,
#define NAME_HALVES(M) halves_##M,
#define NAME_BYTES(M) bytes_##M,
static void (*const floats[])(Four *, const float *, const float *, long,
                              long) = {0, EACH(NAME_FLOATS)};
static void (*const halves[])(Four *, const uint16_t *, const float *, long,
                              long) = {0, EACH(NAME_HALVES)};
static void (*const bytes[])(FourInts *, const int8_t *, const Input *, long,
                             long) = {0, EACH(NAME_BYTES)};

/* e^x in plain arithmetic, of which the compiler makes vector instructions; within 4 units in the
 * last place. With n whole and |r| <= ln(2) / 2: x = n ln(2) + r, so e^x = 2^n e^r. */
static inline float exponential(float x) {
    float within = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = rintf(within * 1.44269504f), power;
    float r = within - n * 0.693145752f - n * 1.42860677e-6f;
    float e = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f +
              r * (0.00833333333f + r * 0.00138888889f)))));
    int32_t bits = ((int32_t)n + 127) << 23;
    memcpy(&power, &bits, sizeof power);
    return x < -87 ? 0 : x > 88 ? INFINITY : e * power;
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
static void narrow(Input *u, float *d, float *low, const float *x, long K, int middle) {
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
        u[k] = (Input)(((int32_t)rintf((x[k] - least) * steps) >> shift) -
                       (KEEPS_MIDDLE ? 0 : middle));
    *d = has_nan ? NAN : range / 255.0f;
    /* two steps merge into one, whose middle lies half a step above the lower one */
    least += shift * *d / 2;
    *d *= 1 + shift;
    *low = least + middle * *d;
}

/* A thread's own memory. u: the rows of x narrowed. */
typedef struct {
    float *normal, *p;
    Input *u;
} Room;

enum { STORE, GELU, ADD };

/* z = the sums of the four rows of W from n on with the rows of x, or for bytes of u - m. */
static void tile(Four *z, const Matrix *w, const float *x, const Input *u, long n, long M, long K,
                 const Shape *s) {
    if (s->kind == FLOAT) floats[M](z, (const float *)w->weight + n * K, x, K, K);
    if (s->kind == HALF) halves[M](z, (const uint16_t *)w->weight + n * K, x, K, K);
    if (s->kind == BYTES) {
        FourInts whole[MOST], shift = {0};
        bytes[M](whole, (const int8_t *)w->weight + n * K, u, K, K);
        for (int r = 0; KEEPS_MIDDLE && r < TILE; r++) /* the sum of a row of q is a whole number */
            shift[r] = s->middle * (int32_t)rintf(w->sums[n + r] / w->scale[n + r]);
        for (long m = 0; m < M; m++) z[m] = __builtin_convertvector(whole[m] - shift, Four);
    }
}

/* A thread's part of y (M, N): x W^T + bias stored, through GELU, or added to y. u: room for the
 * rows of x narrowed. Of more than 8 rows, each 8 take their turn with four rows of W. */
static void product(float *y, const Matrix *w, const float *x, Input *u, long M, long N, long K,
                    int then, const Shape *s) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    long first = N * thread / threads, end = N * (thread + 1) / threads;
    float d[M], low[M];
    Four z[MOST];
    for (long m = 0; s->kind == BYTES && m < M; m++)
        narrow(u + m * K, d + m, low + m, x + m * K, K, s->middle);
    for (long n = first; n < end; n += TILE) {
        /* the last outputs are computed with some before them */
        long at = n < N - TILE ? n : N - TILE, count = end - at < TILE ? end - at : TILE;
        for (long m = 0; m < M; m++) {
            long i = m % MOST, rows = M - m < MOST ? M - m : MOST;
            if (i == 0) tile(z, w, x + m * K, u + m * K, at, rows, K, s);
            Four value = z[i];
            float *to = y + m * N + at;
            if (s->kind == BYTES)
                value = d[m] * value * four(w->scale + at) + low[m] * four(w->sums + at);
            if (w->bias) value += four(w->bias + at);
            if (then == ADD) value += four(to);
            if (n == at && count == TILE)
                *(Four *)to = value;
            else
                for (long r = n - at; r < count; r++) to[r] = value[r];
        }
    }
    for (long m = 0; then == GELU && m < M; m++)
        for (long n = m * N + first; n < m * N + end; n++) /* 0.5 (1 + tanh(t)) = 1 / (1 + e^-2t) */
            y[n] /= 1 + exponential(-1.5957691216f * (y[n] + 0.044715f * y[n] * y[n] * y[n]));
}

/* p (M, all) = the scores of M queries, `step` apart, with the keys k (count, D). */
static void scores(float *p, long all, const float *q, long step, const float *k, long count, long M,
                   long D) {
    Four z[MOST];
    for (long t = 0; t < count; t++) {
        long r = t % TILE;
        if (r == 0 && t + TILE <= count) floats[M](z, k + t * D, q, D, step);
        for (long m = 0; m < M; m++) {
            float sum = z[m][r];
            if (t - r + TILE > count) {
                sum = 0;
                for (long i = 0; i < D; i++) sum += k[t * D + i] * q[m * step + i];
            }
            p[m * all + t] = sum;
        }
    }
}

/* y (M, D), `step` apart, += p (M, all) v (count, D), four positions side by side. */
static void mix(float *restrict y, long step, const float *p, long all, const float *restrict v,
                long count, long M, long D) {
    long t = 0;
    for (; t + TILE <= count; t += TILE, v += TILE * D)
        for (long m = 0; m < M; m++) {
            const float *w = p + m * all + t;
            for (long i = 0; i < D; i++)
                y[m * step + i] +=
                    w[0] * v[i] + w[1] * v[D + i] + w[2] * v[2 * D + i] + w[3] * v[3 * D + i];
        }
    for (; t < count; t++, v += D)
        for (long m = 0; m < M; m++)
            for (long i = 0; i < D; i++) y[m * step + i] += p[m * all + t] * v[i];
}

/* scale p + mask (all) through softmax, but for the division by the sum, which it returns. */
static float exponentials(float *p, const float *mask, long all, float scale) {
    float most = -INFINITY, sum = 0;
    for (long t = 0; t < all; t++) p[t] = p[t] * scale + (mask ? mask[t] : 0);
    for (long t = 0; t < all; t++) most = p[t] > most ? p[t] : most;
    for (long t = 0; t < all; t++) sum += p[t] = exponential(p[t] - most);
    return sum;
}

/* A thread's heads of y (M, C): attention of qkv (M, 3 C) to the cache, which it extends. */
static void attention(float *y, const float *qkv, const Cache *c, long l, float *p, long M,
                      float scale, const Shape *s) {
    long C = s->n_embd, H = s->n_head, D = C / H, rows = c->rows, S = c->common, W = c->past + 1;
    for (long n = omp_get_thread_num(); n < M / rows * H; n += omp_get_num_threads()) {
        long h = n % H, first = n / H * rows;
        const float *q = qkv + first * 3 * C + h * D;
        const float *shared_k = 0, *shared_v = 0;
        float *to = y + first * C + h * D;
        if (S) {
            shared_k = c->shared[l] + n * c->length * D;
            shared_v = shared_k + M / rows * H * c->length * D;
            scores(p, S + W, q, 3 * C, shared_k, S, rows, D);
        }
        for (long m = 0; m < rows; m++) {
            float *k = c->own[l] + ((first + m) * H + h) * c->capacity * D;
            float *v = k + M * H * c->capacity * D, *row = p + m * (S + W);
            memcpy(k + c->past * D, q + m * 3 * C + C, D * sizeof(float));
            memcpy(v + c->past * D, q + m * 3 * C + 2 * C, D * sizeof(float));
            scores(row + S, 0, q + m * 3 * C, 0, k, W, 1, D);
            const float *mask = c->mask ? c->mask + (first + m) * (S + W) : 0;
            float sum = exponentials(row, mask, S + W, scale / sqrtf(D));
            for (long t = 0; t < S + W; t++) row[t] /= sum;
            memset(to + m * C, 0, D * sizeof(float));
            mix(to + m * C, 0, row + S, 0, v, W, 1, D);
        }
        if (S) mix(to, C, p, S + W, shared_v, S, rows, D);
    }
}

static long widest(const Shape *s) { return s->n_inner > s->n_embd ? s->n_inner : s->n_embd; }

/* The floats that a thread needs for itself, then those of all threads together. A vector that lies
 * in two lines of the processor's cache takes two reads, so a thread's room begins with a line. */
static long own_room(const Shape *s, const Cache *c, long M) {
    return (M * (s->n_embd + widest(s)) + c->rows * (c->common + c->past + 1) + 15) / 16 * 16;
}

static long common_room(const Shape *s, long M) {
    return (M * (4 * s->n_embd + s->n_inner) + 15) / 16 * 16;
}

/* The floats of `scratch` in blocks(). */
long room(const Shape *s, const Cache *c, long M, long threads) {
    return common_room(s, M) + threads * own_room(s, c, M);
}

/* x (M, C), the embeddings of a token in each row, become the last block's outputs. */
void blocks(float *x, const Layer *layers, const Shape *s, const Cache *c, float *scratch, long M,
            long threads) {
    long C = s->n_embd, F = s->n_inner;
    float *qkv = scratch, *y = qkv + 3 * M * C, *f = y + M * C;
#pragma omp parallel num_threads((int)threads)
    {
        float *at = scratch + common_room(s, M) + omp_get_thread_num() * own_room(s, c, M);
        Room own = {.normal = at, .u = (Input *)(at + M * C), .p = at + M * (C + widest(s))};
        for (long l = 0; l < s->n_layer; l++) {
            const Layer *a = layers + l;
            for (long m = 0; m < M; m++)
                layer_norm(own.normal + m * C, x + m * C, a->ln_1_weight, a->ln_1_bias, C,
                           s->epsilon);
            product(qkv, &a->c_attn, own.normal, own.u, M, 3 * C, C, STORE, s);
#pragma omp barrier
            attention(y, qkv, c, l, own.p, M, a->scale, s);
#pragma omp barrier
            product(x, &a->attn_c_proj, y, own.u, M, C, C, ADD, s);
#pragma omp barrier
            for (long m = 0; m < M; m++)
                layer_norm(own.normal + m * C, x + m * C, a->ln_2_weight, a->ln_2_bias, C,
                           s->epsilon);
            product(f, &a->c_fc, own.normal, own.u, M, F, C, GELU, s);
#pragma omp barrier
            product(x, &a->mlp_c_proj, f, own.u, M, C, F, ADD, s);
#pragma omp barrier
        }
    }
}

/* y (M, N) = x W^T + bias, by a matrix alone. scratch: M K floats for each thread. */
void linear(float *y, const float *x, const Matrix *w, float *scratch, long M, long N, long K,
            int kind, int middle, long threads) {
    Shape s = {.kind = kind, .middle = middle};
#pragma omp parallel num_threads((int)threads)
    product(y, w, x, (Input *)(scratch + omp_get_thread_num() * M * K), M, N, K, STORE, &s);
}

/* The next 624 words of the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998). */
static void twist(uint32_t *s) {
#define MIXED(i, next) ((s[i] & 0x80000000u) | (s[next] & 0x7fffffffu))
#define STEP(i, next, from)                                                                       \
    s[i] = s[from] ^ MIXED(i, next) >> 1 ^ (s[next] & 1 ? 0x9908b0dfu : 0)
    for (int i = 0; i < 227; i++) STEP(i, i + 1, i + 397);
#pragma GCC ivdep
    for (int i = 227; i < 623; i++) STEP(i, i + 1, i - 227);
    STEP(623, 0, 396);
}

static uint32_t tempered(uint32_t y) {
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

/* found (count) = the uniform variables at `places` among the next `total` of PyTorch's stream, each
 * of two words. places rise. state: 624 words, of which *next is the next one; both move on. */
void uniforms(double *found, const int64_t *places, long count, long total, uint64_t *state,
              uint64_t *next) {
    uint32_t words[624], pair[2];
    int64_t at = -(int64_t)*next; /* of words[0], counted from the first word */
    for (int i = 0; i < 624; i++) words[i] = (uint32_t)state[i];
    for (long n = 0; n < count; n++) {
        for (int half = 0; half < 2; half++) {
            int64_t word = 2 * places[n] + half;
            for (; word >= at + 624; at += 624) twist(words);
            pair[half] = tempered(words[word - at]);
        }
        found[n] = (double)(((uint64_t)pair[0] << 32 | pair[1]) & 0x1fffffffffffffu) * 0x1p-53;
    }
    /* a block is only made once a word of it is needed */
    for (; 2 * total > at + 624; at += 624) twist(words);
    for (int i = 0; i < 624; i++) state[i] = words[i];
    *next = (uint64_t)(2 * total - at);
}
