/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Adds fallocate and lseek to the operation table of pyfuse3, which has neither. Holds no policy.
 *
 * pyfuse3 builds its table privately and hands it to libfuse's fuse_session_new, an ordinary dynamic symbol. This module
 * defines that symbol too. Loaded with RTLD_GLOBAL *before* pyfuse3, it is found first:
 *
 *     pyfuse3 --fuse_session_new(table)--> this file --fuse_session_new(table + 2)--> libfuse
 *
 * From libfuse 3.17 on fuse_session_new is an inline function over fuse_session_new_versioned, so that one is taken.
 * The callbacks run in the thread that runs trio, inside pyfuse3's fuse_session_process_buf, and return at once; the
 * answer is given by reply_errno or reply_offset, exactly once a request, now or later.
 */
#define FUSE_USE_VERSION 312
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <string.h>

static PyObject *on_fallocate, *on_lseek; /* callables, set by install() */
static int extended;                      /* has a session been made with our table? */

/* Calls `callable(*arguments)`; steals `arguments`. A callback that raises is answered with EIO. Needs the GIL. */
static void dispatch(PyObject *callable, PyObject *arguments, fuse_req_t request)
{
    PyObject *result = arguments ? PyObject_CallObject(callable, arguments) : NULL;

    if (!result) {
        PyErr_WriteUnraisable(callable);
        fuse_reply_err(request, EIO);
    }
    Py_XDECREF(result);
    Py_XDECREF(arguments);
}

static void op_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length,
                         struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    dispatch(on_fallocate,
             Py_BuildValue("KKiLL", (unsigned long long)(uintptr_t)request, (unsigned long long)info->fh, mode,
                           (long long)offset, (long long)length),
             request);
    PyGILState_Release(gil);
}

static void op_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    dispatch(on_lseek,
             Py_BuildValue("KKLi", (unsigned long long)(uintptr_t)request, (unsigned long long)info->fh,
                           (long long)offset, whence),
             request);
    PyGILState_Release(gil);
}

/* libfuse's own function of that name: looked up in the very library that our other calls go to. */
static void *libfuse_symbol(const char *name)
{
    Dl_info library;
    void *handle, *symbol;

    if (!dladdr((void *)fuse_reply_err, &library))
        return NULL;
    handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle)
        return NULL;
    symbol = dlsym(handle, name);
    dlclose(handle);
    return symbol;
}

static void extend(struct fuse_lowlevel_ops *table, const struct fuse_lowlevel_ops *given, size_t size)
{
    memset(table, 0, sizeof *table);
    memcpy(table, given, size < sizeof *table ? size : sizeof *table);
    if (!on_fallocate || !on_lseek)
        return;
    table->fallocate = op_fallocate;
    table->lseek = op_lseek;
    extended = 1;
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *given,
                                                size_t size, struct libfuse_version *version, void *userdata)
{
    struct fuse_lowlevel_ops table;
    __typeof__(fuse_session_new_versioned) *real = libfuse_symbol("fuse_session_new_versioned");

    extend(&table, given, size);
    return real ? real(args, &table, sizeof table, version, userdata) : NULL;
}

#else

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *given, size_t size,
                                      void *userdata)
{
    struct fuse_lowlevel_ops table;
    __typeof__(fuse_session_new) *real = libfuse_symbol("fuse_session_new");

    extend(&table, given, size);
    return real ? real(args, &table, sizeof table, userdata) : NULL;
}

#endif

static PyObject *install(PyObject *self, PyObject *arguments)
{
    PyObject *fallocate, *lseek;

    if (!PyArg_ParseTuple(arguments, "OO", &fallocate, &lseek))
        return NULL;
    Py_INCREF(fallocate);
    Py_INCREF(lseek);
    Py_XSETREF(on_fallocate, fallocate);
    Py_XSETREF(on_lseek, lseek);
    Py_RETURN_NONE;
}

static PyObject *is_extended(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(extended);
}

static PyObject *reply_errno(PyObject *self, PyObject *arguments)
{
    unsigned long long request;
    int number;

    if (!PyArg_ParseTuple(arguments, "Ki", &request, &number))
        return NULL;
    fuse_reply_err((fuse_req_t)(uintptr_t)request, number);
    Py_RETURN_NONE;
}

static PyObject *reply_offset(PyObject *self, PyObject *arguments)
{
    unsigned long long request;
    long long offset;

    if (!PyArg_ParseTuple(arguments, "KL", &request, &offset))
        return NULL;
    fuse_reply_lseek((fuse_req_t)(uintptr_t)request, offset);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"install", install, METH_VARARGS,
     "install(fallocate, lseek): fallocate(request, fh, mode, offset, length) and lseek(request, fh, offset, whence)."},
    {"is_extended", is_extended, METH_NOARGS, "Has a FUSE session been made with the two operations?"},
    {"reply_errno", reply_errno, METH_VARARGS, "reply_errno(request, errno): errno 0 is success."},
    {"reply_offset", reply_offset, METH_VARARGS, "reply_offset(request, offset): the answer of lseek."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_ops", "fallocate and lseek for pyfuse3", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__ops(void)
{
    return PyModule_Create(&definition);
}
