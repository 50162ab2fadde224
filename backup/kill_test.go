package backup

import "os"

const childEnv = "HIKAE_TEST_CHILD"

func child() { os.Exit(3) }
