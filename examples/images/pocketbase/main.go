// Command pocketbase is the PocketBase server as its module gives it, with a welcome page at / where its own public
// directory holds none. "pocketbase health" asks the running server whether it is healthy, for health checks.
package main

import (
	"embed"
	"io/fs"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
)

//go:embed public
var public embed.FS

func main() {
	if len(os.Args) == 2 && os.Args[1] == "health" {
		c := http.Client{Timeout: 3 * time.Second}
		r, err := c.Get("http://[::1]:8090/api/health")
		if err != nil || r.StatusCode != http.StatusOK {
			log.Fatal("not healthy: ", err)
		}
		return
	}
	app := pocketbase.New()
	app.OnServe().BindFunc(func(e *core.ServeEvent) error {
		files, err := fs.Sub(public, "public")
		if err != nil {
			return err
		}
		e.Router.GET("/{path...}", apis.Static(files, true))
		return e.Next()
	})
	if err := app.Start(); err != nil {
		log.Fatal(err)
	}
}
