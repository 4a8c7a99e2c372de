/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What of a disk readers were answered: noted with every read, so it costs next to nothing, and asked for where
 * something is discarded, to tell whether anybody had read it.
 *
 *     fresh    the last reads, in the order they were answered
 *     joined   all others: sorted, and neither touching nor overlapping
 *
 * Memory is bounded. Where readers jump about so much that there are more than MOST ranges, those that fill no whole
 * unit are forgotten, of a unit that doubles until there are few enough: what was read can count as unread, and never
 * the other way round.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#define FRESH 512
#define MOST 32768 /* ranges: 512 KiB */
#define UNIT 65536 /* bytes: what is forgotten at first is smaller than two of them */

typedef struct {
    unsigned long long start, end;
} Range;

typedef struct {
    PyObject_HEAD
    Range fresh[FRESH];
    Range *joined;
    size_t fresh_count, joined_count;
} Seen;

static int by_start(const void *left, const void *right)
{
    unsigned long long a = ((const Range *)left)->start, b = ((const Range *)right)->start;

    return (a > b) - (a < b);
}

/* Puts a range, which begins behind no other's end but the last one's, behind those that are there. */
static size_t append(Range *ranges, size_t count, Range next)
{
    if (count && next.start <= ranges[count - 1].end) {
        if (next.end > ranges[count - 1].end)
            ranges[count - 1].end = next.end;
        return count;
    }
    ranges[count] = next;
    return count + 1;
}

/* Keeps the whole units of each range. */
static size_t forget_small(Range *ranges, size_t count, unsigned long long unit)
{
    size_t i, kept = 0;

    for (i = 0; i < count; i++) {
        Range whole = {(ranges[i].start + unit - 1) / unit * unit, ranges[i].end / unit * unit};

        if (whole.start < whole.end)
            kept = append(ranges, kept, whole);
    }
    return kept;
}

/* -1 where there is no memory. */
static int join(Seen *self)
{
    Range *all = PyMem_Malloc((self->joined_count + self->fresh_count + 1) * sizeof *all);
    size_t i = 0, k = 0, count = 0;
    unsigned long long unit;

    if (!all)
        return -1;
    qsort(self->fresh, self->fresh_count, sizeof *self->fresh, by_start);
    while (i < self->joined_count || k < self->fresh_count) {
        int old = k == self->fresh_count || (i < self->joined_count && self->joined[i].start < self->fresh[k].start);

        count = append(all, count, old ? self->joined[i++] : self->fresh[k++]);
    }
    for (unit = UNIT; count > MOST; unit *= 2)
        count = forget_small(all, count, unit);
    PyMem_Free(self->joined);
    self->joined = all;
    self->joined_count = count;
    self->fresh_count = 0;
    return 0;
}

static PyObject *seen_add(Seen *self, PyObject *const *arguments, Py_ssize_t count)
{
    Range next, *last = self->fresh_count ? &self->fresh[self->fresh_count - 1] : NULL;

    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "add(start, end)");
    next.start = PyLong_AsUnsignedLongLong(arguments[0]);
    next.end = PyLong_AsUnsignedLongLong(arguments[1]);
    if (PyErr_Occurred())
        return NULL;
    if (next.start >= next.end)
        Py_RETURN_NONE;
    if (last && last->end == next.start)
        last->end = next.end;
    else
        self->fresh[self->fresh_count++] = next;
    if (self->fresh_count == FRESH && join(self) < 0)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *seen_borders(Seen *self, PyObject *unused)
{
    if (self->fresh_count && join(self) < 0)
        return PyErr_NoMemory();
    return PyBytes_FromStringAndSize((const char *)self->joined, self->joined_count * sizeof *self->joined);
}

static void seen_dealloc(Seen *self)
{
    PyMem_Free(self->joined);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef seen_methods[] = {
    {"add", (PyCFunction)(void (*)(void))seen_add, METH_FASTCALL, "add(start, end): this was answered."},
    {"borders", (PyCFunction)seen_borders, METH_NOARGS,
     "borders(): start, end, start, end, ... of all, strictly increasing, as this machine's unsigned 64-bit integers."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject seen_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qfsbackup.fs._seen.Seen",
    .tp_doc = "Seen(): what readers were answered; nothing yet.",
    .tp_basicsize = sizeof(Seen),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)seen_dealloc,
    .tp_methods = seen_methods,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_seen", "What readers were answered", -1, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__seen(void)
{
    PyObject *module = PyModule_Create(&definition);

    if (!module || PyType_Ready(&seen_type) < 0 || PyModule_AddObjectRef(module, "Seen", (PyObject *)&seen_type) < 0 ||
        PyModule_AddIntMacro(module, MOST) < 0 || PyModule_AddIntMacro(module, UNIT) < 0)
        return NULL;
    return module;
}
