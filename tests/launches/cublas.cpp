// cuBLAS: products are logged.
#include "launch.h"

static thread_local void* current;

EXPORT int cublasCreate_v2(void** handle) { return *handle = (void*)64, 0; }
EXPORT int cublasSetStream_v2(void*, void* stream) { return current = stream, 0; }
EXPORT int cublasGetStream_v2(void*, void** stream) { return *stream = current, 0; }
EXPORT int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
EXPORT int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
EXPORT int cublasGemmEx(void*) { return launch("cublasGemmEx", current), 0; }
EXPORT int cublasSgemm_v2(void*) { return launch("cublasSgemm", current), 0; }
EXPORT int cublasSgemmStridedBatched(void*) { return launch("cublasSgemmStridedBatched", current), 0; }
EXPORT int cublasGemmStridedBatchedEx(void*) { return launch("cublasGemmStridedBatchedEx", current), 0; }
