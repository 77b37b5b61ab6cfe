// Which of the libraries this CPU and its system can run.
#include <cstring>

#include "abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

// In the order of preference; the last one runs everywhere.
struct Isa {
    const char* name;
    bool (*is_supported)();
};

#if defined(__x86_64__)

// __builtin_cpu_supports also asks the system whether it saves the wide registers.
bool has_avx2() {
    unsigned a, b, c = 0, d;
    constexpr unsigned kF16c = 1u << 29;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & kF16c);
}
bool has_avx2_vnni() {
    unsigned a = 0, b, c, d;
    constexpr unsigned kAvxVnni = 1u << 4;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
}
bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

constexpr Isa kIsas[] = {
    {"avx512vnni", has_avx512_vnni},
    {"avx2vnni", has_avx2_vnni},
    {"avx2", has_avx2},
    {"portable", [] { return true; }},
};

#elif defined(__aarch64__)

#if defined(__linux__)
bool has_dot_products() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_matrix_products() { return has_dot_products() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }
#elif defined(__APPLE__)
bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dot_products() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_matrix_products() { return has_dot_products() && has("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dot_products() { return false; }
bool has_matrix_products() { return false; }
#endif

constexpr Isa kIsas[] = {
    {"neon_i8mm", has_matrix_products},
    {"neon_dotprod", has_dot_products},
    {"portable", [] { return true; }},
};

#else

constexpr Isa kIsas[] = {{"portable", [] { return true; }}};

#endif

}  // namespace

const char* covey_isa(int32_t index) {
    for (const Isa& isa : kIsas)
        if (isa.is_supported() && index-- == 0) return isa.name;
    return nullptr;
}
