/* status.c: the one setter of moe_error. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

int moe_fail(moe_error *err, moe_status status, const char *format, ...)
{
    if (err->status != MOE_OK) return err->status;
    err->status = status;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return status;
}
