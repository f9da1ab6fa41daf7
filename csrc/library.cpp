// The Python module fastuda._C. Importing it registers every CPU kernel with the dispatcher. Its BUILD names
// the compiler, the torch version and the flags.
#include <Python.h>
#include <torch/version.h>

#include "cpu/scratch.h"

#ifndef FASTUDA_FLAGS
#define FASTUDA_FLAGS "unknown flags"
#endif
#ifdef __clang__
#define COMPILER __VERSION__
#else
#define COMPILER "GCC " __VERSION__
#endif

static PyObject* release_memory(PyObject*, PyObject*) {
  fastuda::release_blocks();
  Py_RETURN_NONE;
}

extern "C" PyObject* PyInit__C(void) {
  static PyMethodDef methods[] = {{"release_memory", release_memory, METH_NOARGS,
                                   "Free the memory that the kernels keep for their next call."},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr &&
      PyModule_AddStringConstant(module, "BUILD", COMPILER ", torch " TORCH_VERSION ", " FASTUDA_FLAGS) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
