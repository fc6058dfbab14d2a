// Command server is the workload of holdfast's tests: a static HTTP server that does what a test asks of it from inside
// its sandbox, so that the test sees what a workload sees. Never run it where strangers can reach it.
//
//	GET  /                 "hello from HOSTNAME" and the GREETING variable
//	GET  /env /status      environment; /proc/self/status
//	GET  /file?path=P      a file's bytes
//	POST /file?path=P      writes the body, synced
//	GET  /object?bucket=B&key=K  an object of a bucket, with the environment's credentials; POST writes the body
//	GET  /alloc?mib=N      allocates and touches memory
//	GET  /spin?ms=N        burns CPU and tells how many rounds
//	GET  /fork?n=N         starts N sleeping processes and tells how many came up
//	GET  /get?url=U        fetches a URL and passes on what it said
//	GET  /dial?net=N&addr=A opens a connection and tells whether it worked
//	GET  /lookup?name=N    resolves a name
//	GET  /exit?code=N      ends
//	GET  /bytes?n=N        N bytes
//
// "server stubborn" ignores SIGTERM; "server flood N" prints N MiB; "server list DIR" names what is in a
// directory; "server fill FILE N" writes N MiB.
// "server health" asks the own / and exits 0 on success; "server sleep" sleeps; "server print TEXT…" prints and exits.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "health":
			c := http.Client{Timeout: 2 * time.Second}
			r, err := c.Get("http://[::1]:" + port + "/")
			if err != nil || r.StatusCode != 200 {
				fmt.Println("unhealthy:", err)
				os.Exit(1)
			}
			return
		case "sleep":
			time.Sleep(time.Hour)
			return
		case "stubborn":
			signal.Ignore(syscall.SIGTERM)
			fmt.Println("ignoring SIGTERM")
			time.Sleep(time.Hour)
			return
		case "flood":
			line := strings.Repeat("x", 99)
			out := bufio.NewWriter(os.Stdout)
			for i := range atoi(os.Args[2]) << 20 / 100 {
				fmt.Fprintf(out, "%s\n", line[:99-len(strconv.Itoa(i))]+strconv.Itoa(i))
			}
			fmt.Fprintln(out, "flooded")
			out.Flush()
			return
		case "fill":
			f, err := os.Create(os.Args[2])
			if err == nil {
				_, err = io.CopyN(f, zero{}, int64(atoi(os.Args[3]))<<20)
			}
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			return
		case "list":
			entries, err := os.ReadDir(os.Args[2])
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			for _, e := range entries {
				fmt.Println(e.Name())
			}
			return
		case "print":
			fmt.Println(strings.Join(os.Args[2:], " "))
			return
		case "fail":
			os.Exit(3)
		case "spin":
			fmt.Println(spin(atoi(os.Args[2])))
			return
		case "alloc":
			fmt.Println("allocated", len(alloc(atoi(os.Args[2]))))
			return
		case "fork":
			fmt.Println(fork(atoi(os.Args[2])))
			return
		case "status":
			b, _ := os.ReadFile("/proc/self/status")
			os.Stdout.Write(b)
			return
		case "cat":
			b, err := os.ReadFile(os.Args[2])
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			os.Stdout.Write(b)
			return
		case "write":
			if err := os.WriteFile(os.Args[2], []byte("x"), 0o644); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			return
		}
	}
	host, _ := os.Hostname()
	num := func(r *http.Request, k string) int { n, _ := strconv.Atoi(r.FormValue(k)); return n }
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello from %s %s\n", host, os.Getenv("GREETING"))
	})
	http.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) {
		for _, e := range os.Environ() {
			fmt.Fprintln(w, e)
		}
	})
	http.HandleFunc("/status", func(w http.ResponseWriter, r *http.Request) {
		b, _ := os.ReadFile("/proc/self/status")
		w.Write(b)
	})
	http.HandleFunc("/object", serveObject)
	http.HandleFunc("GET /file", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(r.FormValue("path"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		w.Write(b)
	})
	http.HandleFunc("POST /file", func(w http.ResponseWriter, r *http.Request) {
		f, err := os.Create(r.URL.Query().Get("path"))
		if err == nil {
			_, err = io.Copy(f, r.Body)
		}
		if err == nil {
			err = f.Sync()
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		f.Close()
	})
	var kept [][]byte
	http.HandleFunc("/alloc", func(w http.ResponseWriter, r *http.Request) {
		b := alloc(num(r, "mib"))
		kept = append(kept, b)
		fmt.Fprintln(w, "allocated", len(b))
	})
	http.HandleFunc("/spin", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, spin(num(r, "ms")))
	})
	http.HandleFunc("/fork", func(w http.ResponseWriter, r *http.Request) {
		n, err := fork(num(r, "n"))
		fmt.Fprintln(w, n, err)
	})
	http.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		c := http.Client{Timeout: 3 * time.Second}
		resp, err := c.Get(r.FormValue("url"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	})
	http.HandleFunc("/dial", func(w http.ResponseWriter, r *http.Request) {
		c, err := net.DialTimeout(r.FormValue("net"), r.FormValue("addr"), 2*time.Second)
		if err == nil && strings.HasPrefix(r.FormValue("net"), "udp") {
			c.Write([]byte("ping"))
			c.SetReadDeadline(time.Now().Add(time.Second))
			_, err = c.Read(make([]byte, 1))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		c.Close()
		fmt.Fprintln(w, "connected")
	})
	http.HandleFunc("/lookup", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
		defer cancel()
		a, err := net.DefaultResolver.LookupHost(ctx, r.FormValue("name"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		fmt.Fprintln(w, strings.Join(a, " "))
	})
	http.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) { os.Exit(num(r, "code")) })
	http.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		io.CopyN(w, zero{}, int64(num(r, "n")))
	})
	go func() {
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		<-c
		fmt.Println("terminated")
		os.Exit(0)
	}()
	fmt.Println("listening on", port)
	fmt.Fprintln(os.Stderr, "greeting:", os.Getenv("GREETING"))
	if err := http.ListenAndServe("[::]:"+port, nil); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func atoi(s string) int { n, _ := strconv.Atoi(s); return n }

func alloc(mib int) []byte {
	b := make([]byte, mib<<20)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	return b
}

func spin(ms int) int {
	end, n := time.Now().Add(time.Duration(ms)*time.Millisecond), 0
	for time.Now().Before(end) {
		for range 10000 {
			n++
		}
	}
	return n
}

func fork(count int) (int, error) {
	for i := range count {
		if err := exec.Command("/proc/self/exe", "sleep").Start(); err != nil {
			return i, err
		}
	}
	return count, nil
}

type zero struct{}

func (zero) Read(p []byte) (int, error) { clear(p); return len(p), nil }
