// The Python module fastuda._C: importing it registers every CPU kernel with the dispatcher.
#include <Python.h>

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
