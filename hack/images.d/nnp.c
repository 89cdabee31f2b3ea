/* The program of the image nonewprivs: setuid root, it says whether that had an effect. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    printf("Effective uid: %d\n", geteuid());
    return 0;
}
